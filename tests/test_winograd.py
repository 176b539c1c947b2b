"""3x3 convolutions by minimal filtering, against lax and against exact sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_convolutions import (
    assert_close,
    assert_same_gradients,
    assert_stays_on_its_device,
    normal,
    plain_conv,
)

from mljax.models import cpu, layers, winograd


@pytest.mark.parametrize(
    "pads",
    [((1, 1), (1, 1)), ((0, 0), (0, 0)), ((0, 1), (2, 1)), ((2, 2), (0, 2))],
)
@pytest.mark.parametrize("size", [(9, 12), (8, 7), (3, 3)])
def test_equals_lax(size, pads):
    x, weight = normal(0, 4, *size, 20), normal(1, 3, 3, 20, 12)
    value = plain_conv(x, weight, 1, pads)
    assert_close(jax.jit(winograd.conv, static_argnums=2)(x, weight, pads), value)

    g = normal(2, *value.shape)
    _, pull = jax.vjp(lambda x, w: plain_conv(x, w, 1, pads), x, weight)
    found = jax.jit(winograd.gradients, static_argnums=3)(x, g, weight, pads)
    for actual, expected in zip(found, pull(g), strict=True):
        assert_close(actual, expected)


def test_rounds_no_worse_than_lax():
    pads = ((1, 1), (1, 1))
    x, weight = normal(0, 2, 14, 14, 64), normal(1, 3, 3, 64, 64)
    with jax.enable_x64(True):
        exact = plain_conv(x.astype(np.float64), weight.astype(np.float64), 1, pads)
        exact = np.asarray(exact)
    ours, plain = winograd.conv(x, weight, pads), plain_conv(x, weight, 1, pads)
    worst, allowed = (np.abs(np.asarray(y) - exact).max() for y in (ours, plain))
    assert worst < allowed


def products(by, x, weight, stride=1) -> int:
    """How many are in the computation of `by(x, weight)`; a 2x2 square has 16."""
    pads = layers._pads(x.shape[1:3], weight.shape[0], stride, "same")
    conv = jax.make_jaxpr(lambda x, w: by(x, w, stride, pads))(x, weight)
    return str(conv).count("dot_general")


def with_gradients(x, weight, stride, pads):
    value, pull = jax.vjp(lambda x, w: cpu._dense_conv(x, w, stride, pads), x, weight)
    return pull(jnp.ones_like(value))


@pytest.mark.parametrize(
    ("channels", "size", "forward", "backward"),
    [
        ((64, 64), 16, True, True),
        ((48, 192), 16, True, True),
        ((40, 40), 16, False, True),  # too little is saved forward
        ((24, 24), 16, False, False),
        ((64, 64), 4, False, True),  # too few squares for the sums of the weights
    ],
)
def test_is_chosen_where_it_saves_time(channels, size, forward, backward):
    x = jax.ShapeDtypeStruct((2, size, size, channels[0]), jnp.float32)
    weight = jax.ShapeDtypeStruct((3, 3, *channels), jnp.float32)
    of_value = products(cpu._dense_conv, x, weight)
    of_gradients = products(with_gradients, x, weight) - of_value
    assert (of_value >= 16) == forward
    assert (of_gradients >= 32) == backward  # a product a tap is 9, or 18


@pytest.mark.parametrize(
    ("kernel", "stride", "dtype"),
    [(5, 1, jnp.float32), (3, 2, jnp.float32), (3, 1, jnp.bfloat16)],
)
def test_is_for_3x3_in_float32_alone(kernel, stride, dtype):
    x = jax.ShapeDtypeStruct((2, 16, 16, 64), dtype)
    weight = jax.ShapeDtypeStruct((kernel, kernel, 64, 64), dtype)
    assert products(cpu._dense_conv, x, weight, stride) < 16
    assert not winograd.has_faster_gradients(x, weight, stride)


def test_dense_conv_by_squares_equals_lax():
    pads = ((1, 1), (1, 1))
    x, weight = normal(0, 2, 15, 18, 64), normal(1, 3, 3, 64, 72)
    assert winograd.is_faster(x, weight, 1, pads)
    conv = jax.jit(cpu.dense_conv, static_argnums=(2, 3))
    assert_same_gradients(conv, plain_conv, x, weight, 1, pads)


def test_of_several_weights_and_twice():
    pads = ((1, 1), (1, 1))
    x, weight = normal(0, 2, 16, 16, 64), normal(1, 3, 3, 64, 64)
    both = np.stack([weight, -2 * weight])

    def over_both(conv):
        each = jax.vmap(lambda w: (conv(x, w, 1, pads) ** 2).mean())
        return jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(each(w) / 1e3))))(both)

    def twice(conv):
        inner = jax.grad(lambda w: (conv(x, w, 1, pads) ** 3).mean())
        return jax.jit(jax.grad(lambda w: (inner(w) ** 2).sum()))(weight)

    for of in (over_both, twice):
        assert_close(of(cpu.dense_conv), of(plain_conv), 1e-5)


def test_stays_on_its_device():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    over_batch = NamedSharding(mesh, PartitionSpec("data"))
    x, weight = normal(0, 8, 12, 16, 64), normal(1, 3, 3, 64, 64)

    def loss(x, weight):
        return jnp.sum(jnp.sin(cpu.dense_conv(x, weight, 1, ((1, 1), (1, 1)))))

    assert_stays_on_its_device(loss, x, weight, over_batch)
