"""BatchNorm against numpy, in the forms that it has on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_convolutions import assert_close, normal

from mljax.models import batch_norm, layers

FORMS = ("cpu", "gpu", "tpu")
ACTIVATIONS = {
    "none": None,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "hard_swish": layers.ACTIVATIONS["hard_swish"],
}


@pytest.fixture(params=FORMS, autouse=True)
def form(request, monkeypatch):
    """What is traced in the test is so as for this backend."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def functional(norm):
    """((params, stats, x, activation) -> y in training, params, stats)."""
    graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

    def network(params, stats, x, activation):
        return nnx.merge(graph, params, stats)(x, True, activation)

    return network, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


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
        network, params, stats = functional(norm)

        def loss(params, x, stats):
            return jnp.sum(network(params, stats, x, None) * g)

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


@pytest.mark.parametrize(
    ("offset", "close"), [(0, 1e-6), (10, 1e-6), (1e3, 1e-5), (1e4, 5e-5)]
)
def test_variance_far_from_zero(offset, close):
    x = (offset + normal(0, 8, 28, 28, 8)).astype(np.float32)
    norm = batch_norm.BatchNorm(8, momentum=1.0)
    norm(jnp.asarray(x), train=True)
    expected = x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.running_var[...], expected, rtol=close)


def test_a_half_precision_input_is_not_rounded_again_before_the_activation():
    x = jnp.asarray(normal(0, 4, 5, 5, 3), jnp.bfloat16)
    norm = batch_norm.BatchNorm(3)
    y = norm(x, train=True)
    np.testing.assert_array_equal(norm(x, True, jax.nn.silu), jax.nn.silu(y))


def test_sums_of_rows_and_of_images_are_alike(form):
    """Rows first, as on a CPU, or whole images, as elsewhere."""
    x = jnp.asarray(3 + normal(0, 2, 5, 7, 4))
    traced = jax.jit(lambda x: batch_norm._mean(x)).trace(x)
    sums = sum(e.primitive.name == "reduce_sum" for e in traced.jaxpr.eqns)
    assert sums == (3 if form == "cpu" else 2)
    found = traced.lower().compile()(x)
    assert_close(found, np.asarray(x).mean((0, 1, 2)), 1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_batch_norm_with_an_activation(name, dtype):
    """Values and gradients are those of the activation after the formula."""
    activation = ACTIVATIONS[name]
    with jax.enable_x64(True):
        norm = batch_norm.BatchNorm(7, dtype=dtype)
        wide = norm.weight[...].dtype
        weight, bias = (jnp.asarray(1 + normal(i, 7), wide) for i in range(2))
        x, g = (jnp.asarray(3 * normal(i, 4, 3, 5, 7), dtype) for i in range(2, 4))
        norm.weight[...], norm.bias[...] = weight, bias
        network, params, stats = functional(norm)

        def ours(params, x):
            y = network(params, stats, x, activation)
            assert y.dtype == dtype
            return jnp.sum(y.astype(wide) * g), y

        def formula(weight, bias, x):
            exact = x.astype(wide)
            mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
            y = (exact - mean) / jnp.sqrt(var + 1e-5) * weight + bias
            y = activation(y.astype(dtype)) if activation else y.astype(dtype)
            return jnp.sum(y.astype(wide) * g), y

        (by_params, by_x), y = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(params, x)
        gradients, value = jax.grad(formula, (0, 1, 2), has_aux=True)(weight, bias, x)
        close = {"float64": 1e-12, "bfloat16": 2e-2}[dtype]
        found = [y, by_params["weight"], by_params["bias"], by_x]
        for one, other in zip(found, [value, *gradients], strict=True):
            wide_one, wide_other = (np.asarray(x, np.float64) for x in (one, other))
            assert_close(wide_one, wide_other, close)


def test_batch_norm_keeps_one_map_for_the_way_back(form):
    """On a GPU the one before it; others also keep the one that the activation saw."""
    network, params, stats = functional(batch_norm.BatchNorm(5))
    x = jnp.asarray(normal(0, 8, 6, 6, 5))
    _, back = jax.vjp(lambda x: network(params, stats, x, jax.nn.silu), x)
    maps = {id(a): a for a in jax.tree.leaves(back) if getattr(a, "size", 0) >= x.size}
    assert (len(maps) == 1) == (form == "gpu")


def test_batch_norm_outside_training_uses_the_activation():
    norm = batch_norm.BatchNorm(5)
    x = jnp.asarray(normal(0, 2, 3, 3, 5))
    np.testing.assert_array_equal(norm(x, activation=jax.nn.relu), jax.nn.relu(norm(x)))


@pytest.mark.parametrize("shape", [(6, 7), (6, 5, 7), (1, 4, 4, 7), (3, 1, 1, 7)])
def test_batch_norm_of_any_number_of_axes(shape):
    x = 5 + normal(0, *shape)
    norm = batch_norm.BatchNorm(7, momentum=1.0)
    norm(jnp.asarray(x), train=True)
    axes, n = tuple(range(x.ndim - 1)), x.size // 7
    assert_close(norm.running_mean[...], x.mean(axes), 1e-6)
    assert_close(norm.running_var[...], x.var(axes) * n / max(n - 1, 1), 1e-6)


def test_images_far_from_each_other():
    x = normal(0, 4, 6, 6, 3) + np.array([0, 50, -300, 1000])[:, None, None, None]
    norm = batch_norm.BatchNorm(3, momentum=1.0)
    norm(jnp.asarray(x, jnp.float32), train=True)
    assert_close(norm.running_var[...], x.var((0, 1, 2)) * 144 / 143, 1e-5)


def test_batch_norm_of_one_value_a_channel_stays_finite():
    norm = batch_norm.BatchNorm(4)
    assert np.isfinite(norm(jnp.ones((1, 1, 1, 4)), train=True)).all()
    assert np.isfinite(norm.running_var[...]).all()


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
