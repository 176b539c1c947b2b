"""Convolutions of 3x3 by minimal filtering, for XLA's CPU backend.

Four pixels that lie in a square are computed together (Winograd's F(2x2, 3x3): Lavin
and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section
4.1): the 4x4 pixels they see and the 3x3 weights become 16 sums each, and a matrix
product over the channels follows for each of the 16. That is 16 multiplications where
the definition takes 36, and it rounds about as well.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mljax.models.taps import Pads, Spread, output_size, tap

Matrix = Sequence[Sequence[float]]
Grid = Sequence[Sequence[jax.Array]]

_STEP, _WINDOW = 2, 4  # pixels on a side of what is computed together, and of its view
_OF_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_WEIGHT = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))


def is_faster(x: jax.Array, weight: jax.Array, stride: int, pads: Pads) -> bool:
    """Whether `conv` takes this convolution, and less time for it than XLA's own.

    x [batch, H, W, C], weight [k, k, C, D].
    """
    rows, columns = _squares(x, pads)
    enough = len(x) * rows * columns >= 128  # or the sums of weights cost too much
    return enough and _takes(x, weight, stride) and _saved(weight) >= 30


def has_faster_gradients(x: jax.Array, weight: jax.Array, stride: int) -> bool:
    """The same of `gradients`, beside matrix products a tap."""
    return _takes(x, weight, stride) and _saved(weight) >= 15


def _takes(x: jax.Array, weight: jax.Array, stride: int) -> bool:
    return stride == 1 and weight.shape[:2] == (3, 3) and x.dtype == jnp.float32


def _saved(weight: jax.Array) -> float:
    """The multiplications saved grow with C times D, what is moved with C plus D."""
    inputs, outputs = weight.shape[2:]
    return inputs * outputs / (inputs + outputs)


def _squares(x: jax.Array, pads: Pads) -> tuple[int, int]:
    height, width = output_size(x, 3, 1, pads)
    return -(-height // _STEP), -(-width // _STEP)


# Outside a compiled program each of the many steps would be compiled by itself.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def conv(x: jax.Array, weight: jax.Array, pads: Pads) -> jax.Array:
    """x [batch, H, W, C], weight [3, 3, C, D], stride 1 -> [batch, H', W', D]."""
    batch, outputs = len(x), weight.shape[-1]
    rows, columns = _squares(x, pads)

    def product(seen: jax.Array, taps: jax.Array) -> jax.Array:
        return (seen @ taps).reshape(batch, rows, columns, outputs)

    products = _each(product, _of_input(x, pads), _of_weight(weight))
    squares = _transform(_OF_OUTPUT, lax.optimization_barrier(products))
    y = jnp.stack([jnp.stack(row, 3) for row in squares], 2)
    height, width = output_size(x, 3, 1, pads)
    y = y.reshape(batch, rows * _STEP, columns * _STEP, outputs)
    return y[:, :height, :width]


@functools.partial(jax.jit, static_argnums=3, inline=True)
def gradients(
    x: jax.Array, g: jax.Array, weight: jax.Array, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """By x and by weight, from the gradient g [batch, H', W', D] by what `conv` gives.

    Its steps, transposed and backwards; what g becomes is used for both.
    """
    of_input, of_output = _of_input(x, pads), _of_gradient(g, x, pads)
    by_taps = _each(lambda seen, worth: seen.T @ worth, of_input, of_output)
    by_weight = _transform(_transposed(_OF_WEIGHT), by_taps)
    by_seen = _each(lambda worth, taps: worth @ taps.T, of_output, _of_weight(weight))
    stacked = jnp.stack([jnp.stack(row) for row in by_weight])
    return _to_input(by_seen, x, pads), stacked


def _transform(matrix: Matrix, grid: Grid) -> list[list[jax.Array]]:
    """The matrix times the grid times the transposed matrix, entries being arrays."""
    rows = [
        [_sum(weights, column) for column in zip(*grid, strict=True)]
        for weights in matrix
    ]
    return [[_sum(weights, row) for weights in matrix] for row in rows]


def _each(
    f: Callable[[jax.Array, jax.Array], jax.Array], grid: Grid, other: Grid
) -> Grid:
    rows = zip(grid, other, strict=True)
    return [[f(a, b) for a, b in zip(*both, strict=True)] for both in rows]


def _transposed(matrix: Matrix) -> Matrix:
    return list(zip(*matrix, strict=True))


def _sum(weights: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    weighted = [w * a for w, a in zip(weights, arrays, strict=True) if w]
    return functools.reduce(operator.add, weighted)


def _flat(grid: Grid) -> Grid:
    """Each array as a matrix that lies in memory: [positions, channels]."""
    flat = [[a.reshape(-1, a.shape[-1]) for a in row] for row in grid]
    return lax.optimization_barrier(flat)


def _of_input(x: jax.Array, pads: Pads) -> Grid:
    size = _squares(x, pads)
    missing = [
        (before, _STEP * squares + 2 - before - have)
        for squares, (before, _), have in zip(size, pads, x.shape[1:3], strict=True)
    ]
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *missing, (0, 0))))
    places = range(_WINDOW)
    seen = [[tap(x, i, j, size, _STEP) for j in places] for i in places]
    return _flat(_transform(_OF_INPUT, seen))


def _of_weight(weight: jax.Array) -> Grid:
    taps = [list(row) for row in weight]
    return lax.optimization_barrier(_transform(_OF_WEIGHT, taps))


def _of_gradient(g: jax.Array, x: jax.Array, pads: Pads) -> Grid:
    """What g is to each of the 16 products."""
    size = _squares(x, pads)
    missing = [
        (0, _STEP * squares - have)
        for squares, have in zip(size, g.shape[1:3], strict=True)
    ]
    g = lax.optimization_barrier(jnp.pad(g, ((0, 0), *missing, (0, 0))))
    places = range(_STEP)
    squares = [[tap(g, i, j, size, _STEP) for j in places] for i in places]
    return _flat(_transform(_transposed(_OF_OUTPUT), squares))


def _to_input(by_seen: Grid, x: jax.Array, pads: Pads) -> jax.Array:
    """The gradient by x: every pixel is seen by up to four squares."""
    spread = Spread(_WINDOW, _STEP, pads, x.shape)
    shape = (len(x), *_squares(x, pads), x.shape[-1])
    parts = [[part.reshape(shape) for part in row] for row in by_seen]
    pixels = _transform(_transposed(_OF_INPUT), lax.optimization_barrier(parts))

    def of_tap(i: int, j: int) -> jax.Array:
        return spread.meeting(spread.pad(pixels[i][j]), i, j)

    return spread.add_up(of_tap, x.dtype)
