"""Batch normalisation with a derivative of its own (Ioffe & Szegedy 2015)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models import cpu
from mljax.models.layers import at_least_float32, constant


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise_batch(
    x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y, mean, biased variance) of x [..., C] over all axes but the last.

    The derivative is given by hand (Ioffe & Szegedy 2015, section 3): it reads the
    map twice where the one that autodiff derives reads it four times.
    """
    return _normalise_forward(x, weight, bias, eps)[0]


def _mean(x: jax.Array) -> jax.Array:
    """The mean of x [N, ..., C] over all axes but the last: of each image, then of all.

    So the values of an image are added in one order on any number of devices, and only
    the sum over images is rounded in another way.
    """

    def means(x: jax.Array) -> jax.Array:
        return jnp.mean(x, tuple(range(1, x.ndim - 1)))

    return jnp.mean(cpu.choose(cpu.image_means, means, x), 0)


def _normalise_forward(x, weight, bias, eps):
    exact = x.astype(at_least_float32(x.dtype))
    mean = _mean(exact)
    var = _mean(jnp.square(exact - mean))
    inverse = lax.rsqrt(var + eps)
    scale = weight * inverse
    y = exact * scale + (bias - mean * scale)
    return (y, mean, var), (x, weight, mean, inverse)


def _normalise_backward(eps, saved, gradients):
    x, weight, mean, inverse = saved
    g, by_mean, by_var = gradients
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    x_exact = x.astype(g.dtype)
    # Without the barrier XLA finds x - mean in the forward pass too, and keeps the map
    # of it in memory instead of subtracting twice.
    centre = lax.optimization_barrier(mean)
    by_bias = jnp.sum(g, axes)
    by_weight = jnp.sum(g * (x_exact - centre), axes) * inverse
    # dx = scale g + slope x + offset, each [C].
    scale = weight * inverse
    slope = (2 * by_var - scale * inverse * by_weight) / count
    offset = (by_mean - scale * by_bias) / count - slope * mean
    by_x = scale * g + slope * x_exact + offset
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

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        weight, bias = self.weight[...], self.bias[...]
        if train and not self.fixed and self.groups == 1:
            y, mean, var = _normalise_batch(x, weight, bias, self.eps)
            self._move_statistics(mean, var, x.size // x.shape[-1])
        elif train and not self.fixed:
            parts = x.reshape(self.groups, -1, *x.shape[1:])
            y, means, variances = jax.vmap(
                lambda part: _normalise_batch(part, weight, bias, self.eps)
            )(parts)
            y = y.reshape(x.shape)
            count = x.size // x.shape[-1] // self.groups
            self._move_statistics(means.mean(0), variances.mean(0), count)
        else:
            mean, var = self.running_mean[...], self.running_var[...]
            exact = x.astype(at_least_float32(x.dtype))
            y = (exact - mean) * (weight * lax.rsqrt(var + self.eps)) + bias
        return y.astype(self.dtype)

    def _move_statistics(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        unbiased = var * (count / max(count - 1, 1))
        for stat, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            old = stat[...]
            stat[...] = (old + self.momentum * (new - old)).astype(old.dtype)
