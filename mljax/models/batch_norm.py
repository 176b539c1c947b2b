"""Batch normalisation with a derivative of its own (Ioffe & Szegedy 2015)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models import cpu
from mljax.models.layers import at_least_float32, constant

Activation = Callable[[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise_batch(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    eps: float,
    activation: Activation | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(activation(y), mean, biased variance) of x [..., C] over all axes but the last.

    Without an activation y is in float32 at least, with one it is rounded to the type
    of x before it. The derivative is given by hand (Ioffe & Szegedy 2015, section 3):
    it reads the map twice where the one that autodiff derives reads it four times.
    Both times it goes through the activation anew, instead of keeping a map of its
    gradient in between.
    """
    return _normalise_forward(x, weight, bias, eps, activation)[0]


def _mean(x: jax.Array) -> jax.Array:
    """The mean of x [N, ..., C] over all axes but the last: of each image, then of all.

    So the values of an image are added in one order on any number of devices, and only
    the sum over images is rounded in another way.
    """

    def means(x: jax.Array) -> jax.Array:
        return jnp.mean(x, tuple(range(1, x.ndim - 1)))

    return jnp.mean(cpu.choose(cpu.image_means, means, x), 0)


def _one_after_the_other(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of x [N, ..., C], which is read twice."""
    mean = _mean(x)
    return mean, _mean(jnp.square(x - mean))


def _at_once(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of x [N, ..., C], which is read once.

    A GPU waits for memory here: a second look costs as much as the first. Within an
    image the variance comes from the sums of d and d^2, where d is the distance to the
    image's first pixel: little cancels, however far from zero it is. Then images are
    put together (Chan et al. 1983, "Algorithms for computing the sample variance",
    equation 2.1b).
    """
    images, within = x.shape[0], tuple(range(1, x.ndim - 1))
    first = x[(slice(None), *(slice(1) for _ in within))]
    away = x - first
    shift, square = jnp.mean(away, within), jnp.mean(jnp.square(away), within)
    variances = jnp.maximum(square - jnp.square(shift), 0)
    means = first.reshape(shift.shape) + shift
    # Divided before they are summed up: as a step of its own it takes as long.
    mean = jnp.sum(means / images, 0)
    return mean, jnp.sum((variances + jnp.square(means - mean)) / images, 0)


def _normalise_forward(x, weight, bias, eps, activation):
    exact = x.astype(at_least_float32(x.dtype))
    mean, var = (_at_once if cpu.is_on("gpu") else _one_after_the_other)(exact)
    inverse = lax.rsqrt(var + eps)
    scale = weight * inverse
    y = exact * scale + (bias - mean * scale)
    if activation:
        y = activation(y.astype(x.dtype))
    return (y, mean, var), (x, weight, bias, mean, inverse)


def _normalise_backward(eps, activation, saved, gradients):
    x, weight, bias, mean, inverse = saved
    g, by_mean, by_var = gradients
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    scale = weight * inverse

    def both(x: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x and the gradient by y, in float32 at least."""
        exact = x.astype(at_least_float32(x.dtype))
        if not activation:
            return exact, g
        y = exact * scale + (bias - mean * scale)
        (by_y,) = jax.vjp(activation, y.astype(x.dtype))[1](g)
        return exact, by_y.astype(exact.dtype)

    # Without the barriers XLA finds what is computed twice, and keeps maps in memory.
    centre = lax.optimization_barrier(mean)
    exact, by_y = both(lax.optimization_barrier(x) if activation else x, centre)
    by_bias = jnp.sum(by_y, axes)
    by_weight = jnp.sum(by_y * (exact - centre), axes) * inverse
    # dx = scale by_y + slope x + offset, each [C].
    slope = (2 * by_var - scale * inverse * by_weight) / count
    offset = (by_mean - scale * by_bias) / count - slope * mean
    exact, by_y = both(x, mean)
    by_x = scale * by_y + slope * exact + offset
    kept = weight.dtype
    return by_x.astype(x.dtype), by_weight.astype(kept), by_bias.astype(kept)


_normalise_batch.defvjp(_normalise_forward, _normalise_backward)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, as torch's BatchNorm2d.

    In training the biased variance of the batch normalises and the unbiased one moves
    `running_var` (Flax's own layer keeps the biased one there). `momentum` is torch's:
    the weight of the new batch, so 0.1 is 0.9 in Flax. Statistics are computed in
    float32 at least. Under a jit over a mesh the batch is the whole batch. Once `fixed`
    it uses its running statistics in training too, and they do not move. With `groups`
    above 1 that many equal parts of the batch, one after the other, are normalised each
    by itself, and the running statistics move by the means over them.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dtype: DTypeLike = jnp.float32,
    ):
        self.weight = nnx.Param(constant(1, features, dtype))
        self.bias = nnx.Param(constant(0, features, dtype))
        self.running_mean = nnx.BatchStat(constant(0, features, dtype))
        self.running_var = nnx.BatchStat(constant(1, features, dtype))
        self.eps, self.momentum, self.dtype = eps, momentum, dtype
        self.fixed = False
        self.groups = 1

    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        activation: Activation | None = None,
    ) -> jax.Array:
        """x [..., C] normalised, then through `activation`, which is elementwise."""
        if train and not self.fixed and self.groups == 1:
            y, mean, var = self._normalised(x, activation)
            self._move_statistics(mean, var, x.size // x.shape[-1])
            return y
        if train and not self.fixed:
            parts = x.reshape(self.groups, -1, *x.shape[1:])
            y, means, variances = jax.vmap(
                lambda part: self._normalised(part, activation)
            )(parts)
            count = x.size // x.shape[-1] // self.groups
            self._move_statistics(means.mean(0), variances.mean(0), count)
            return y.reshape(x.shape)
        mean, var = self.running_mean[...], self.running_var[...]
        weight, bias = self.weight[...], self.bias[...]
        exact = x.astype(at_least_float32(x.dtype))
        y = (exact - mean) * (weight * lax.rsqrt(var + self.eps)) + bias
        y = y.astype(self.dtype)
        return activation(y) if activation else y

    def _normalised(
        self, x: jax.Array, activation: Activation | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(activation(y), mean, biased variance), y by the batch's own statistics."""
        # Other compilers than a GPU's make more of the two as they are.
        joined = cpu.is_on("gpu") and x.dtype == self.dtype
        inside, after = (activation, None) if joined else (None, activation)
        weight, bias = self.weight[...], self.bias[...]
        y, mean, var = _normalise_batch(x, weight, bias, self.eps, inside)
        y = y.astype(self.dtype)
        return after(y) if after else y, mean, var

    def _move_statistics(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        unbiased = var * (count / max(count - 1, 1))
        for stat, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            old = stat[...]
            stat[...] = (old + self.momentum * (new - old)).astype(old.dtype)
