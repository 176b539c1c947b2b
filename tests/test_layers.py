"""Layers against lax, numpy and the arithmetic of torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_convolutions import assert_close, normal

from mljax.models import layers


def test_unknown_padding_is_an_error():
    with pytest.raises(ValueError, match="'valid'"):
        layers.Conv(3, 4, 3, padding="valid", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["avg", "max", "avg+max"])
def test_pool(kind):
    x = normal(0, 2, 3, 4, 5)
    expected = 0
    if kind != "max":
        expected = expected + x.mean((1, 2))
    if kind != "avg":
        expected = expected + x.max((1, 2))
    assert_close(layers.pool(jnp.asarray(x), kind), expected)
    with pytest.raises(ValueError, match="avg, max"):
        layers.pool(jnp.asarray(x), "mean")


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_relu(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, g = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0]), jnp.arange(1.0, 6)
    y, back = jax.vjp(layers.relu, x)
    np.testing.assert_array_equal(y, jax.nn.relu(x))
    np.testing.assert_array_equal(*back(g), jnp.where(x > 0, g, 0))


def test_activations():
    x = jnp.array([-4.0, -1.0, 0.0, 1.0, 4.0])
    hard_swish = layers.ACTIVATIONS["hard_swish"](x)
    np.testing.assert_allclose(hard_swish, [0, -1 / 3, 0, 2 / 3, 4], rtol=1e-6)
    np.testing.assert_allclose(layers.PReLU()(x), [-1, -0.25, 0, 1, 4])


@pytest.mark.parametrize("shape", [(60000,), (200, 300), (100, 7, 90), (9, 5, 40, 32)])
def test_dropout(shape):
    out = np.asarray(layers.dropout(jnp.ones(shape), 0.25, nnx.Rngs(0)))
    assert out.shape == shape
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
    assert abs(out.mean() - 1) < 0.01


def test_dropout_of_neighbours():
    """Entries whose bits come from one draw are dropped independently of each other."""
    out = np.asarray(layers.dropout(jnp.ones((400, 200)), 0.25, nnx.Rngs(0)))
    together = (out[:, :100] == 0) & (out[:, 100:] == 0)
    assert abs(together.mean() - 0.25**2) < 0.005
    assert not (out[0] == out[1]).all()


def test_no_dropout():
    x = jnp.ones((10, 10))
    assert layers.dropout(x, 0.0, None) is x
    with pytest.raises(ValueError, match="rngs"):
        layers.dropout(x, 0.25, None)


def test_initial_values():
    draw = layers.draw
    first = draw(nnx.Rngs(0), "normal", (300, 200), 0.5, "float32")
    assert first.dtype == jnp.float32
    assert abs(float(first.std()) - 0.5) < 0.01
    again = draw(nnx.Rngs(0), "normal", (300, 200), 0.5, "bfloat16")
    np.testing.assert_array_equal(first, again)
    rngs = nnx.Rngs(0)
    one, two = (draw(rngs, "normal", (9,), 1.0, "float32") for _ in range(2))
    assert not np.array_equal(one, two)
    bounded = draw(rngs, "uniform", (300, 200), 0.5, "float32")
    assert 0.49 < float(jnp.abs(bounded).max()) <= 0.5

    conv = layers.Conv(8, 500, 5, bias=True, uniform=True, rngs=nnx.Rngs(0))
    for values in (conv.weight[...], conv.bias[...]):  # as torch.nn.Conv2d
        assert 0.95 < float(jnp.abs(values).max()) * (25 * 8) ** 0.5 <= 1

    def traced():
        rngs = nnx.Rngs(0)
        return draw(rngs, "normal", (3, 4), 1.0, "float32")

    assert jax.eval_shape(traced).shape == (3, 4)
    assert abs(float(jax.jit(traced)().std()) - 1) < 0.6


def test_drawing_a_network_is_cheap(caplog):
    rngs = nnx.Rngs(0)
    layers.draw(rngs, "normal", (99, 200), 1.0, "float32")
    with jax.log_compiles():
        for i in range(100):
            layers.draw(rngs, "normal", (100 + i, 200), 1.0, "float32")
            layers.draw(rngs, "uniform", (100 + i,), 1.0, "float32")
            layers.constant(1.0, (100 + i, 3), "float32")
        assert not caplog.records  # a program for each shape takes minutes in all
        layers.draw(nnx.Rngs(0), "normal", (99, 200), jnp.ones(17).sum(), "float32")
    assert caplog.records  # what is compiled is seen here


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_dropout_of_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match="dropout is .*: must be at least 0 and below"):
        layers.dropout(jnp.ones((2, 3)), rate, nnx.Rngs(0))
