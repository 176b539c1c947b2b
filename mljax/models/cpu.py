"""Forms of convolutions that are fast on XLA's CPU backend, equal to the plain ones.

XLA runs a grouped convolution on the CPU one channel at a time (10 to 275 times
slower than it should be), so a depthwise convolution is written as a sum of shifted
slices. Its derivatives are given by hand: those that autodiff derives read the whole
map once per tap, and XLA fuses what follows the convolution into each of these reads.
The gradients of other convolutions are matrix products, a max-pool shifted slices too.
"""

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mljax.models import winograd
from mljax.models.taps import Pads, Spread, output_size, tap

_HERE, _PLAIN, _PORTABLE = "here", "plain", "portable"
_forms = contextvars.ContextVar("forms", default=_HERE)


def choose(
    fast: Callable[..., jax.Array], plain: Callable[..., jax.Array], *operands: Any
) -> jax.Array:
    """`fast(*operands)` where a model is computed on a CPU, else `plain(*operands)`.

    What is traced inside `plain_forms` or `portable_forms` chooses as these say.
    """
    if _forms.get() == _PORTABLE:
        return lax.platform_dependent(*operands, cpu=fast, default=plain)
    return (fast if is_on("cpu") else plain)(*operands)


def is_on(backend: str) -> bool:
    """Whether a model that is traced now is computed on "cpu", "gpu" or "tpu" alone."""
    return _forms.get() == _HERE and jax.default_backend() == backend


def is_plain() -> bool:
    """Whether a model that is traced now is made of convolutions alone."""
    return _forms.get() == _PLAIN


def plain_forms() -> AbstractContextManager[None]:
    """What is traced inside takes the plain convolutions on every backend.

    For runtimes that know convolutions (ONNX), and for those who look at the
    computation instead of running it. Those of one pixel are no matrix products then.
    """
    return _using(_PLAIN)


def portable_forms() -> AbstractContextManager[None]:
    """What is traced inside holds both forms; the platform that compiles it chooses.

    For programs that are lowered for several platforms at once. No gradients.
    """
    return _using(_PORTABLE)


@contextlib.contextmanager
def _using(forms: str) -> Iterator[None]:
    token = _forms.set(forms)
    try:
        yield
    finally:
        _forms.reset(token)


def _shifted(x: jax.Array, weight: jax.Array, stride: int, pads: Pads) -> jax.Array:
    kernel = weight.shape[0]
    height, width = output_size(x, kernel, stride, pads)
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    weight = weight.astype(_wide(x))
    met = (
        tap(padded, i, j, (height, width), stride) * weight[i, j, 0]
        for i in range(kernel)
        for j in range(kernel)
    )
    return functools.reduce(operator.add, met).astype(x.dtype)


def _wide(x: jax.Array) -> jnp.dtype:
    """What sums of half-precision numbers are taken in, as convolutions do."""
    return jnp.promote_types(x.dtype, jnp.float32)


def stem_conv(x: jax.Array, weight: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """A convolution of few channels: x [batch, H, W, C], weight [k, k, C, D].

    The pixels under each tap are laid side by side, and a matrix product follows. XLA's
    own convolution of three channels is six times slower, and its gradient turns the
    whole batch round.
    """
    kernel, outputs = weight.shape[0], weight.shape[-1]
    height, width = output_size(x, kernel, stride, pads)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    taps = [(i, j) for i in range(kernel) for j in range(kernel)]
    met = [tap(x, i, j, (height, width), stride) for i, j in taps]
    flat = jnp.concatenate(met, -1).reshape(-1, len(taps) * x.shape[-1])
    return product(flat, weight.reshape(-1, outputs)).reshape(
        -1, height, width, outputs
    )


def patch_conv(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A convolution whose windows lie side by side, as one matrix product.

    x [batch, k H, k W, C], weight [k, k, C, D] -> [batch, H, W, D].
    """
    (batch, height, width, channels), kernel = x.shape, weight.shape[0]
    rows, columns = height // kernel, width // kernel
    x = x.reshape(batch, rows, kernel, columns, kernel, channels)
    flat = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * rows * columns, -1)
    outputs = weight.shape[-1]
    return product(flat, weight.reshape(-1, outputs)).reshape(
        batch, rows, columns, outputs
    )


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., inputs] @ weight [inputs, outputs].

    In the gradient by the weight that autodiff derives, XLA computes g once more,
    turned round and with all that comes before it (dropout, BatchNorm): here x and g
    are read as they lie in memory.
    """
    return _product(x, weight) if is_on("cpu") else x @ weight


@jax.custom_vjp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _product_forward(x, weight):
    return x @ weight, (x, weight)


def _product_backward(saved, g):
    x, weight = saved
    x, g = lax.optimization_barrier((x, g))
    rows, g_rows = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return g @ weight.T, rows.T @ g_rows


_product.defvjp(_product_forward, _product_backward)


def convolve(
    x: jax.Array, weight: jax.Array, stride: int, pads: Pads, groups: int = 1
) -> jax.Array:
    """The plain one: x [batch, H, W, C], weight [k, k, C / groups, D] -> [..., D]."""
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def dense_conv(x: jax.Array, weight: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """`convolve` of one group, whose gradient by the weight is a product a tap.

    XLA takes that gradient as a convolution with a kernel as large as the map, two to
    six times as long. With a stride the one by the map is a product too. 3x3 taps of
    many channels are taken by minimal filtering (`winograd`), forward and back.
    """
    return (_dense_conv if is_on("cpu") else convolve)(x, weight, stride, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_conv(x: jax.Array, weight: jax.Array, stride: int, pads: Pads) -> jax.Array:
    return _dense_value(x, weight, stride, pads)


def _dense_value(x, weight, stride, pads):
    if winograd.is_faster(x, weight, stride, pads):
        return winograd.conv(x, weight, pads)
    return convolve(x, weight, stride, pads)


def _dense_forward(x, weight, stride, pads):
    return _dense_value(x, weight, stride, pads), (x, weight)


def _dense_backward(stride, pads, saved, g):
    x, weight = saved
    x, g = lax.optimization_barrier((x, g))
    if winograd.has_faster_gradients(x, weight, stride):
        return winograd.gradients(x, g, weight, pads)
    by_x = _dense_input_gradient(x, g, weight, stride, pads)
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    kernel = weight.shape[0]
    taps = [(i, j) for i in range(kernel) for j in range(kernel)]
    rows = g.reshape(-1, g.shape[-1]).astype(_wide(g))
    by_tap = []
    for i, j in taps:
        met = lax.optimization_barrier(tap(padded, i, j, g.shape[1:3], stride))
        by_tap.append(met.reshape(-1, x.shape[-1]).astype(rows.dtype).T @ rows)
    return by_x, jnp.stack(by_tap).reshape(weight.shape).astype(weight.dtype)


_dense_conv.defvjp(_dense_forward, _dense_backward)


def _dense_input_gradient(x, g, weight, stride, pads):
    kernel, (channels, outputs) = weight.shape[0], weight.shape[2:]
    if stride == 1 or kernel < stride:
        return jax.vjp(lambda x: convolve(x, weight, stride, pads), x)[1](g)[0]
    # One product gives what each pixel of g is worth to each tap. XLA would take a
    # convolution of g with zeros between its pixels.
    by_tap = weight.astype(_wide(g)).transpose(3, 0, 1, 2).reshape(outputs, -1)
    worth = g.reshape(-1, outputs).astype(by_tap.dtype) @ by_tap
    spread = Spread(kernel, stride, pads, x.shape)
    worth = lax.optimization_barrier(spread.pad(worth.reshape(*g.shape[:3], -1)))

    def of_tap(i: int, j: int) -> jax.Array:
        first = (i * kernel + j) * channels
        part = lax.slice_in_dim(worth, first, first + channels, axis=3)
        return spread.meeting(part, i, j)

    return spread.add_up(of_tap, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, kernel: int, stride: int, pads: Pads) -> jax.Array:
    """The largest of k x k pixels: x [batch, H, W, C] -> [batch, H', W', C].

    Of several that are equally large the first gets the gradient, row by row, as in
    XLA's own form, whose gradient looks for it once more and then scatters.
    """
    return functools.reduce(jnp.maximum, _pooled(x, kernel, stride, pads))


def _pooled(x, kernel, stride, pads):
    size = output_size(x, kernel, stride, pads)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    # Or what makes the map (BatchNorm) would be computed anew for every tap.
    x = lax.optimization_barrier(x)
    return [tap(x, i, j, size, stride) for i in range(kernel) for j in range(kernel)]


def _pool_forward(x, kernel, stride, pads):
    best, *others = _pooled(x, kernel, stride, pads)
    winner = jnp.zeros(best.shape, jnp.int32)
    for place, other in enumerate(others, 1):
        winner = jnp.where(other > best, place, winner)
        best = jnp.maximum(best, other)
    return best, (winner, x[:0])  # nothing but the shape of x


def _pool_backward(kernel, stride, pads, saved, g):
    winner, x = saved
    spread = Spread(kernel, stride, pads, (len(g), *x.shape[1:]))
    winner, g = lax.optimization_barrier((spread.pad(winner, -1), spread.pad(g)))

    def of_tap(i: int, j: int) -> jax.Array:
        won = spread.meeting(winner, i, j) == i * kernel + j
        return jnp.where(won, spread.meeting(g, i, j), 0)

    return (spread.add_up(of_tap, x.dtype),)


max_pool.defvjp(_pool_forward, _pool_backward)


def image_means(x: jax.Array) -> jax.Array:
    """The mean of every channel of every image: x [batch, ..., C] -> [batch, C].

    Axis by axis: XLA takes one mean over height and width on a single core.
    """
    for axis in reversed(range(1, x.ndim - 1)):
        x = jnp.mean(x, axis)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x: jax.Array, weight: jax.Array, stride: int, pads: Pads
) -> jax.Array:
    """x [batch, H, W, C], weight [k, k, 1, C] -> [batch, H', W', C]."""
    return _shifted(x, weight, stride, pads)


def _forward(x, weight, stride, pads):
    return _shifted(x, weight, stride, pads), (x, weight)


def _backward(stride, pads, saved, g):
    x, weight = saved
    by_x = _input_gradient(g, weight, stride, pads, x.shape)
    return by_x, _weight_gradient(x, g, weight, stride, pads)


def _input_gradient(g, weight, stride, pads, shape):
    spread, dtype = Spread(weight.shape[0], stride, pads, shape), g.dtype
    weight, g = weight.astype(_wide(g)), spread.pad(g)
    return spread.add_up(lambda i, j: spread.meeting(g, i, j) * weight[i, j, 0], dtype)


def _weight_gradient(x, g, weight, stride, pads):
    """Sums x * g over batch and positions for each tap, a few rows of g at a time.

    The running sums start with the first rows (zeros would be copied for every tap) and
    keep batch and columns: adding rows is three times faster than reducing them, and
    with a sharded batch every device adds up its own images and one all-reduce follows
    the loop.
    """
    kernel = weight.shape[0]
    height, width = g.shape[1:3]
    kept = jnp.promote_types(g.dtype, jnp.float32)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    taps = [(i, j) for i in range(kernel) for j in range(kernel)]

    def products(row):
        # Each row is cut out by itself: out of several rows that were cut out
        # together XLA reads one three times slower.
        above = lax.dynamic_slice_in_dim(x, row * stride, kernel, axis=1)
        g_row = lax.dynamic_slice_in_dim(g, row, 1, axis=1).astype(kept)
        return [tap(above, i, j, (1, width), stride) * g_row for i, j in taps]

    def add_rows(sums, first, count):
        for row in range(count):
            added = products(first + row)
            sums = [total + a for total, a in zip(sums, added, strict=True)]
        return sums

    # The sums are read and written once for so many rows. At least two times: of a
    # loop that runs once XLA makes something slower.
    at_once = next((n for n in (4, 2) if height > 2 * n), 1)
    start = height % at_once or at_once
    sums, _ = lax.scan(
        lambda sums, i: (add_rows(sums, start + at_once * i, at_once), None),
        add_rows(products(0), 1, start - 1),
        jnp.arange((height - start) // at_once),
    )
    total = jnp.stack([jnp.sum(x, (0, 1, 2)) for x in sums])
    return total.reshape(weight.shape).astype(weight.dtype)


depthwise_conv.defvjp(_forward, _backward)
