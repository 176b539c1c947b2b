"""Layers against lax, numpy and the arithmetic of torch."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_convolutions import assert_close, normal

from mljax.models import batch_norm, cpu, layers


def test_unknown_padding_is_an_error():
    with pytest.raises(ValueError, match="'valid'"):
        layers.Conv(3, 4, 3, padding="valid", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_batch_norm_is_torchs(dtype):
    with jax.enable_x64(True):
        x = np.asarray(jnp.asarray(3 + 2 * normal(0, 4, 3, 5, 7), dtype), np.float64)
        norm = batch_norm.BatchNorm(7, eps=1e-3, momentum=0.2, dtype=dtype)
        norm.weight[...] = jnp.asarray(1 + 0.1 * normal(1, 7), norm.weight[...].dtype)
        norm.bias[...] = jnp.asarray(normal(2, 7), norm.bias[...].dtype)
        weight, bias = np.asarray(norm.weight[...]), np.asarray(norm.bias[...])
        mean, var, n = x.mean((0, 1, 2)), x.var((0, 1, 2)), x.size // 7
        tolerance = {"float32": 1e-6, "float64": 1e-13, "bfloat16": 1e-2}[dtype]

        trained = norm(jnp.asarray(x, dtype), train=True)
        assert trained.dtype == dtype
        expected = (x - mean) / np.sqrt(var + 1e-3) * weight + bias
        assert_close(trained.astype("float64"), expected, tolerance)

        exact = 1e-6 if dtype != "float64" else 1e-13
        assert norm.running_var[...].dtype == layers.at_least_float32(dtype)
        assert_close(norm.running_mean[...], 0.2 * mean, exact)
        assert_close(norm.running_var[...], 0.8 + 0.2 * var * n / (n - 1), exact)

        used = norm(jnp.asarray(x, dtype))
        running = np.asarray(norm.running_mean[...]), np.asarray(norm.running_var[...])
        expected = (x - running[0]) / np.sqrt(running[1] + 1e-3) * weight + bias
        assert_close(used.astype("float64"), expected, tolerance)


def test_batch_norm_gradients_against_the_formula():
    """Ioffe & Szegedy 2015, in float64: dx = w/s (g - mean(g) - xhat mean(g xhat))."""
    with jax.enable_x64(True):
        x, g, weight = (
            normal(i, *shape).astype(np.float64)
            for i, shape in enumerate([(4, 3, 5, 7), (4, 3, 5, 7), (7,)])
        )
        norm = batch_norm.BatchNorm(7, dtype="float64")
        norm.weight[...] = jnp.asarray(weight)
        graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

        def loss(params, x, stats):
            return jnp.sum(nnx.merge(graph, params, stats)(x, train=True) * g)

        params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
        grads, dx = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(x), stats)
        axes = (0, 1, 2)
        s = np.sqrt(x.var(axes) + 1e-5)
        xhat = (x - x.mean(axes)) / s
        assert_close(grads["weight"], (g * xhat).sum(axes), 1e-12)
        assert_close(grads["bias"], g.sum(axes), 1e-12)
        centred = g - g.mean(axes) - xhat * (g * xhat).mean(axes)
        assert_close(dx, weight / s * centred, 1e-12)


def test_batch_norm_keeps_precision_far_from_zero():
    x = jnp.asarray(1000 + normal(0, 64, 8, 8, 4))
    out = np.asarray(batch_norm.BatchNorm(4)(x, train=True))
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-3)


def test_batch_norm_adds_up_alike_in_both_forms():
    """Rows first, as on a CPU, or whole images, as elsewhere."""
    x = jnp.asarray(3 + normal(0, 2, 5, 7, 4))
    found = {}
    for name, form in (("rows", contextlib.nullcontext), ("images", cpu.plain_forms)):
        with form():
            traced = jax.jit(lambda x: batch_norm._mean(x)).trace(x)
        sums = sum(e.primitive.name == "reduce_sum" for e in traced.jaxpr.eqns)
        found[name] = sums, traced.lower().compile()(x)
    assert found["rows"][0] == 3
    assert found["images"][0] == 2
    assert_close(found["rows"][1], np.asarray(found["images"][1]), 1e-6)


def test_batch_norm_of_one_value_a_channel_stays_finite():
    norm = batch_norm.BatchNorm(4)
    assert np.isfinite(norm(jnp.ones((1, 1, 1, 4)), train=True)).all()
    assert np.isfinite(norm.running_var[...]).all()


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


def test_batch_norm_of_groups_is_that_of_each_alone():
    x = np.random.default_rng(0).normal(size=(8, 3, 3, 5)).astype(np.float32)
    x[4:] += 2
    both = batch_norm.BatchNorm(5)
    both.groups = 2
    y = both(jnp.asarray(x), train=True)
    alone = [batch_norm.BatchNorm(5), batch_norm.BatchNorm(5)]
    parts = [
        bn(jnp.asarray(x[4 * i : 4 * i + 4]), train=True) for i, bn in enumerate(alone)
    ]
    np.testing.assert_allclose(y, np.concatenate(parts), atol=1e-6)
    for stat in ("running_mean", "running_var"):
        mean = sum(getattr(bn, stat)[...] for bn in alone) / 2
        np.testing.assert_allclose(getattr(both, stat)[...], mean, atol=1e-6)
    np.testing.assert_array_equal(both(jnp.asarray(x)).shape, x.shape)


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_dropout_of_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match="dropout is .*: must be at least 0 and below"):
        layers.dropout(jnp.ones((2, 3)), rate, nnx.Rngs(0))
