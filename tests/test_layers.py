"""Layers against lax, numpy and the arithmetic of torch."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mljax.models import batch_norm, cpu, layers


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain_conv(x, weight, stride, pads, groups=1):
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
    )


def assert_close(actual, expected, tolerance=1e-6):
    """Largest difference below `tolerance` of the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("padding", "size"),
    [("same", (9, 12)), ("same", (8, 7)), ("half", (9, 12))],
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_equals_lax(kernel, stride, padding, size):
    x, weight = normal(0, 3, *size, 24), normal(1, kernel, kernel, 1, 24)
    padding = "same" if padding == "same" else kernel // 2
    pads = layers._pads(size, kernel, stride, padding)
    shape = cpu.depthwise_conv(x, weight, stride, pads).shape
    g = normal(2, *shape)

    def value_and_gradients(conv):
        def all_three(x, weight, g):
            value, pull = jax.vjp(conv, x, weight)
            return value, *pull(g)

        return jax.jit(all_three)(x, weight, g)

    ours = value_and_gradients(lambda x, w: cpu.depthwise_conv(x, w, stride, pads))
    plain = value_and_gradients(lambda x, w: plain_conv(x, w, stride, pads, groups=24))
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (7, 2), (3, 1)])
def test_stem_equals_lax(kernel, stride):
    x, weight = normal(0, 3, 19, 22, 3), normal(1, kernel, kernel, 3, 8)
    pads = layers._pads((19, 22), kernel, stride, "same")

    def value_and_gradients(conv):
        value, pull = jax.vjp(lambda x, w: conv(x, w, stride, pads), x, weight)
        return value, *pull(normal(2, *value.shape))

    ours, plain = value_and_gradients(cpu.stem_conv), value_and_gradients(plain_conv)
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected)


def test_depthwise_in_bfloat16_keeps_the_dtype_and_sums_in_float32():
    x, weight = normal(0, 4, 16, 16, 8), normal(1, 3, 3, 1, 8)
    pads = ((1, 1), (1, 1))

    def gradient(x, weight):
        def total(weight):
            return cpu.depthwise_conv(x, weight, 1, pads).astype(jnp.float32).sum()

        return jax.jit(jax.grad(total))(weight)

    half = gradient(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    x = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    assert_close(half.astype(jnp.float32), gradient(x, jnp.asarray(weight)), 5e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_in_bfloat16_is_rounded_once(stride):
    x, weight = normal(0, 2, 16, 16, 8), normal(1, 5, 5, 1, 8)
    x, weight = (jnp.asarray(a, jnp.bfloat16) for a in (x, weight))
    pads = ((2, 2), (2, 2))

    def value_and_gradient(x, weight):
        value, pull = jax.vjp(lambda x: cpu.depthwise_conv(x, weight, stride, pads), x)
        return value, *pull(jnp.ones_like(value))

    exact = value_and_gradient(x.astype(jnp.float32), weight.astype(jnp.float32))
    for half, whole in zip(value_and_gradient(x, weight), exact, strict=True):
        np.testing.assert_array_equal(half, whole.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 7), (2, 5, 3, 7)])
def test_product_equals_matmul(shape):
    x, weight = normal(0, *shape), normal(1, 7, 9)

    def value_and_gradients(product, dtype):
        value, pull = jax.vjp(
            product, jnp.asarray(x, dtype), jnp.asarray(weight, dtype)
        )
        return value, *pull(jnp.asarray(normal(2, *shape[:-1], 9), dtype))

    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        ours = value_and_gradients(cpu.product, dtype)
        plain = value_and_gradients(jnp.matmul, dtype)
        for actual, expected in zip(ours, plain, strict=True):
            assert actual.dtype == dtype
            assert_close(actual.astype(float), expected.astype(float), tolerance)


def test_patches_are_a_convolution():
    x, weight = normal(0, 2, 8, 12, 3), normal(1, 4, 4, 3, 5)
    plain = plain_conv(x, weight, 4, ((0, 0), (0, 0)))
    assert_close(cpu.patch_conv(jnp.asarray(x), jnp.asarray(weight)), plain)
    conv = layers.Conv(3, 5, 4, stride=4, rngs=nnx.Rngs(0))
    for shape in ((2, 8, 12, 3), (2, 9, 14, 3)):  # with pixels left over too
        images = normal(2, *shape)
        plain = plain_conv(images, conv.weight[...], 4, ((0, 0), (0, 0)))
        assert_close(conv(jnp.asarray(images)), plain)


def test_depthwise_gradients_of_a_sharded_batch():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    over_batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x, weight, pads = normal(0, 16, 9, 9, 8), normal(1, 3, 3, 1, 8), ((1, 1), (1, 1))

    def loss(x, weight):
        return jnp.sum(jnp.sin(cpu.depthwise_conv(x, weight, 2, pads)))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    sharded = gradients.lower(jax.device_put(x, over_batch), weight).compile()
    for actual, expected in zip(
        sharded(jax.device_put(x, over_batch), weight),
        gradients(x, weight),
        strict=True,
    ):
        assert_close(actual, expected)
    program = sharded.as_text()
    assert "all-gather" not in program  # every device keeps to its own images
    assert program.count("all-reduce(") == 1


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (2, 2)])
def test_same_padding_is_tensorflows(kernel, stride, size):
    conv = layers.Conv(
        3, 4, kernel, stride=stride, padding="same", rngs=nnx.Rngs(0), bias=True
    )
    x = normal(0, 2, *size, 3)
    expected = plain_conv(x, conv.weight[...], stride, "SAME")
    assert_close(conv(jnp.asarray(x)), expected)


@pytest.mark.parametrize("inputs", [3, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_conv_and_its_gradients_equal_lax(kernel, stride, inputs):
    pads = ((kernel // 2,) * 2,) * 2
    conv = layers.Conv(
        inputs, 6, kernel, stride=stride, padding=kernel // 2, rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(conv)
    x = jnp.asarray(normal(0, 2, 9, 11, inputs))

    def ours(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

    def plain(params, x):
        return jnp.sum(jnp.sin(plain_conv(x, params["weight"][...], stride, pads)))

    for actual, expected in zip(
        jax.tree.leaves(jax.jit(jax.grad(ours, (0, 1)))(params, x)),
        jax.tree.leaves(jax.jit(jax.grad(plain, (0, 1)))(params, x)),
        strict=True,
    ):
        assert_close(actual, expected, 2e-6)


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


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_one_pixel_convolutions_with_padding(padding):
    conv = layers.Conv(3, 4, 1, stride=2, padding=padding, rngs=nnx.Rngs(0))
    x = normal(0, 2, 5, 6, 3)
    pads = layers._pads((5, 6), 1, 2, padding)
    found = conv(x)
    assert_close(found, plain_conv(x, conv.weight[...], 2, pads))
    with cpu.plain_forms():
        assert_close(conv(x), found)


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_dropout_of_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match="dropout is .*: must be at least 0 and below"):
        layers.dropout(jnp.ones((2, 3)), rate, nnx.Rngs(0))
