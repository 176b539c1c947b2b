"""Convolutions and matrix products in their forms for the CPU, against lax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mljax.models import cpu, layers


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


def assert_same_gradients(conv, other, x, weight, *where):
    """Values and both gradients of two forms of one convolution."""
    found = []
    for form in (conv, other):
        value, pull = jax.vjp(lambda x, w, f=form: f(x, w, *where), x, weight)
        found.append((value, *pull(normal(2, *value.shape))))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


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


@pytest.mark.parametrize("padding", ["same", 0, 1])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (2, 2), (5, 3), (2, 3)])
def test_dense_equals_lax(kernel, stride, padding):
    x, weight = normal(0, 3, 9, 12, 6), normal(1, kernel, kernel, 6, 8)
    pads = layers._pads((9, 12), kernel, stride, padding)

    assert_same_gradients(cpu.dense_conv, plain_conv, x, weight, stride, pads)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (3, 1), (5, 3)])
@pytest.mark.parametrize("size", [(9, 12), (8, 7)])
def test_max_pool_equals_lax(size, kernel, stride):
    x = np.round(normal(0, 3, *size, 6))  # many are equally large
    pads = ((1, 1), (0, 1))

    def plain(x):
        window, strides = (1, kernel, kernel, 1), (1, stride, stride, 1)
        whole = ((0, 0), *pads, (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, whole)

    found = []
    for form in (lambda x: cpu.max_pool(x, kernel, stride, pads), plain):
        value, pull = jax.vjp(form, x)
        found.append((value, *pull(normal(1, *value.shape))))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


def test_max_pool_passes_nan_on():
    x = np.ones((1, 4, 4, 1), np.float32)
    x[0, 1, 1, 0] = np.nan
    found = cpu.max_pool(x, 2, 2, ((0, 0), (0, 0)))[0, :, :, 0]
    np.testing.assert_array_equal(found, [[np.nan, 1], [1, 1]])


def test_dense_of_several_weights_and_twice():
    x, weight = normal(0, 3, 9, 12, 6), normal(1, 3, 3, 6, 8)
    stride, pads = 2, ((0, 1), (1, 1))
    both = np.stack([weight, -2 * weight])

    def over_both(conv):
        each = jax.vmap(lambda w: (conv(x, w, stride, pads) ** 2).sum())
        return jax.grad(lambda w: jnp.sum(jnp.sin(each(w) / 1e3)))(both)

    def twice(conv):
        inner = jax.grad(lambda w: (conv(x, w, stride, pads) ** 3).sum())
        return jax.grad(lambda w: (inner(w) ** 2).sum())(weight)

    for of in (over_both, twice):
        assert_close(of(cpu.dense_conv), of(plain_conv), 1e-5)


def test_dense_in_bfloat16_sums_in_float32():
    x, weight = normal(0, 4, 16, 16, 8), normal(1, 3, 3, 8, 8)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x, weight)]

    def gradient(conv, x, weight):
        return jax.grad(
            lambda w: conv(x, w, 1, ((1, 1), (1, 1))).astype(jnp.float32).sum()
        )(weight)

    found = gradient(cpu.dense_conv, *half)
    exact = gradient(plain_conv, *(a.astype(jnp.float32) for a in half))
    assert found.dtype == jnp.bfloat16
    assert_close(found.astype(jnp.float32), exact, 4e-3)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (7, 2), (3, 1)])
def test_stem_equals_lax(kernel, stride):
    x, weight = normal(0, 3, 19, 22, 3), normal(1, kernel, kernel, 3, 8)
    pads = layers._pads((19, 22), kernel, stride, "same")

    assert_same_gradients(cpu.stem_conv, plain_conv, x, weight, stride, pads)


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
    cotangent = normal(2, *shape[:-1], 9)

    def value_and_gradients(product, dtype, computed):
        rounded = (jnp.asarray(v, dtype).astype(computed) for v in (x, weight))
        value, pull = jax.vjp(product, *rounded)
        return value, *pull(jnp.asarray(cotangent, dtype).astype(computed))

    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        ours = value_and_gradients(cpu.product, dtype, dtype)
        # In float32: XLA's own products of bfloat16 may be further off than ours.
        plain = value_and_gradients(jnp.matmul, dtype, jnp.float32)
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


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_of_a_sharded_batch(dense):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    over_batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x, pads = normal(0, 16, 9, 9, 8), ((1, 1), (1, 1))
    weight = normal(1, 3, 3, 8 if dense else 1, 8)

    def loss(x, weight):
        if dense:
            x = cpu.max_pool(cpu.dense_conv(x, weight, 2, pads), 3, 2, pads)
        else:
            x = cpu.depthwise_conv(x, weight, 2, pads)
        return jnp.sum(jnp.sin(x))

    assert_stays_on_its_device(loss, x, weight, over_batch)


def assert_stays_on_its_device(loss, x, weight, over_batch):
    """Both gradients, of a sharded batch and of a whole one; one all-reduce."""
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


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_one_pixel_convolutions_with_padding(padding):
    conv = layers.Conv(3, 4, 1, stride=2, padding=padding, rngs=nnx.Rngs(0))
    x = normal(0, 2, 5, 6, 3)
    pads = layers._pads((5, 6), 1, 2, padding)
    found = conv(x)
    assert_close(found, plain_conv(x, conv.weight[...], 2, pads))
    with cpu.plain_forms():
        assert_close(conv(x), found)
