"""A network as it is used elsewhere: BatchNorm as one product and one sum."""

import jax
from flax import nnx
from jax import lax

from mljax.models.batch_norm import Activation, BatchNorm
from mljax.models.layers import Frozen


class Affine(nnx.Module):
    """scale * x + bias, [..., C]; what a BatchNorm is once nothing is trained.

    It can be merged with the convolution before it, which compilers do not do with a
    difference, a product and a sum.
    """

    def __init__(self, norm: BatchNorm):
        scale = norm.weight[...] * lax.rsqrt(norm.running_var[...] + norm.eps)
        self.scale = Frozen(scale)
        self.bias = Frozen(norm.bias[...] - norm.running_mean[...] * scale)
        self.dtype = norm.dtype

    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        activation: Activation | None = None,
    ) -> jax.Array:
        y = (self.scale[...] * x + self.bias[...]).astype(self.dtype)
        return activation(y) if activation else y


def fixed(model: nnx.Module) -> nnx.Module:
    """A copy with an `Affine` in place of every BatchNorm. Not to be trained.

    The scores are the same up to rounding.
    """
    copy = nnx.clone(model)
    for _, module in list(nnx.iter_modules(copy)):
        for name, child in list(vars(module).items()):
            if isinstance(child, BatchNorm):
                setattr(module, name, Affine(child))
    return copy
