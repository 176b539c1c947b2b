"""Where the taps of a convolution meet its map, and how their gradients come back."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def tap(x: jax.Array, i: int, j: int, size: tuple[int, int], stride: int) -> jax.Array:
    """The [batch, *size, channels] pixels of a padded map that tap (i, j) meets."""
    batch, _, _, channels = x.shape
    end = (batch, i + (size[0] - 1) * stride + 1, j + (size[1] - 1) * stride + 1)
    return lax.slice(x, (0, i, j, 0), (*end, channels), (1, stride, stride, 1))


def output_size(x: jax.Array, kernel: int, stride: int, pads: Pads) -> tuple[int, int]:
    """Height and width of what a kernel gives for x [batch, H, W, C]."""
    height, width = (
        (size + sum(pad) - kernel) // stride + 1
        for size, pad in zip(x.shape[1:3], pads, strict=True)
    )
    return height, width


class Spread(NamedTuple):
    """From a convolution's output back to a map of `shape`: pixel p of the padded map
    gets what q gives it by tap t, for every q stride + t = p.

    With stride 2 the pixels of even and of odd rows and columns meet different taps:
    each of the four kinds is a sum of shifted slices, and they are interleaved.
    """

    kernel: int
    stride: int
    pads: Pads
    shape: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of each kind."""
        rows, columns = (
            -(-(self.pads[i][0] + self.shape[1 + i]) // self.stride) for i in range(2)
        )
        return rows, columns

    @property
    def before(self) -> int:
        """Rows, and columns, of zeros that a padded output begins with."""
        return (self.kernel - 1) // self.stride

    def pad(self, g: jax.Array, value: int = 0) -> jax.Array:
        """g [batch, H', W', ...], so large that every tap meets a pixel of it."""
        sides = [
            (self.before, max(size - have, 0))
            for size, have in zip(self.size, g.shape[1:3], strict=True)
        ]
        return jnp.pad(g, ((0, 0), *sides, (0, 0)), constant_values=value)

    def meeting(self, g: jax.Array, i: int, j: int) -> jax.Array:
        """The pixels of a padded g that give by tap (i, j)."""
        row, column = (self.before - place // self.stride for place in (i, j))
        return tap(g, row, column, self.size, 1)

    def add_up(
        self, of_tap: Callable[[int, int], jax.Array], dtype: jnp.dtype
    ) -> jax.Array:
        """The map: `of_tap` is what each pixel of a kind gets by a tap of it."""

        def kind(top: int, left: int) -> jax.Array:
            taps = (
                of_tap(i, j)
                for i in range(top, self.kernel, self.stride)
                for j in range(left, self.kernel, self.stride)
            )
            return functools.reduce(operator.add, taps).astype(dtype)

        kinds = range(self.stride)
        x = jnp.stack(
            [jnp.stack([kind(top, left) for left in kinds], 3) for top in kinds], 2
        )
        (batch, height, width, channels), (rows, columns) = self.shape, self.size
        x = x.reshape(batch, rows * self.stride, columns * self.stride, channels)
        (top, _), (left, _) = self.pads
        return x[:, top : top + height, left : left + width]
