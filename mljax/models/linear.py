"""Linear and cosine heads: pool the map, classify the vector."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models.layers import (
    ACTIVATIONS,
    Conv,
    Linear,
    PReLU,
    at_least_float32,
    draw,
    dropout,
    pool,
)


def normalise(x: jax.Array, axis: int, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) along `axis`, as torch's F.normalize, in float32 at least.

    Vectors no longer than `eps` get a zero gradient. Torch's is g / eps there, 1e12
    for a vector of zeros, and one dead image would decide the whole step.
    """
    x = x.astype(at_least_float32(x.dtype))
    squares = jnp.sum(jnp.square(x), axis, keepdims=True)
    tiny = squares <= eps * eps
    inverse = lax.rsqrt(jnp.where(tiny, 1, squares))
    return jnp.where(tiny, lax.stop_gradient(x) / eps, x * inverse)


class CosineClassifier(nnx.Module):
    """Cosine of x [batch, features] with each class's vector: [batch, num_classes].

    weight [features, num_classes], N(0, 1) scaled to unit length per class. The
    result is in float32 at least and clipped to [-1, 1].
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        weight = draw(rngs, "normal", (features, num_classes), 1.0, dtype)
        self.weight = nnx.Param(weight / jnp.linalg.norm(weight, axis=0))

    def __call__(self, x: jax.Array) -> jax.Array:
        x, weight = normalise(x, 1), normalise(self.weight[...], 0)
        # A margin acts on differences far below bfloat16's spacing, which
        # accelerators would use inside a float32 product.
        cosines = jnp.matmul(x, weight, precision=lax.Precision.HIGHEST)
        return jnp.clip(cosines, -1, 1)


class LinearHead(nnx.Module):
    """Map [batch, H, W, features] -> scores [batch, num_classes] in float32 at least.

    pool -> (1x1 `conv_head` to `hidden` channels -> activation) -> dropout ->
    classifier, which is linear (logits) or, with `cosine`, a CosineClassifier.

    Args:
      pool: "avg", "max" or "avg+max".
      dropout: share of the features dropped in training.
      hidden: channels of MobileNetV3's `conv_head`; 0 = none.
      activation: after `conv_head`: "relu", "hard_swish" or "prelu".

    Raises ValueError for an unknown pool or activation.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        cosine: bool = False,
        pool: str = "avg",
        dropout: float = 0.0,
        hidden: int = 0,
        activation: str = "relu",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if pool not in ("avg", "max", "avg+max"):
            raise ValueError(f"pool is {pool!r}; choose avg, max or avg+max")
        if activation != "prelu" and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {activation!r}; choose {', '.join(ACTIVATIONS)}, prelu"
            )
        self.conv_head = (
            Conv(features, hidden, 1, bias=True, dtype=dtype, rngs=rngs)
            if hidden
            else None
        )
        prelu = activation == "prelu"
        act2 = PReLU(dtype=dtype) if prelu else ACTIVATIONS[activation]
        self.act2 = act2 if hidden else None
        classifier = CosineClassifier if cosine else Linear
        # Scores rounded to bfloat16 would tie, and the ranking with them.
        self.classifier = classifier(
            hidden or features, num_classes, dtype=at_least_float32(dtype), rngs=rngs
        )
        self.pool, self.dropout = pool, dropout

    def __call__(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        x = pool(feature_map, self.pool)
        if self.conv_head is not None and self.act2 is not None:
            x = self.act2(self.conv_head(x[:, None, None])[:, 0, 0])
        if train:
            x = dropout(x, self.dropout, rngs)
        return self.classifier(x)


def cosine(features: int, num_classes: int, **options) -> LinearHead:
    """A head whose scores are cosines, for AAM; the other options of `LinearHead`.

    ValueError for `cosine=False`, which is the head "linear".
    """
    if not options.setdefault("cosine", True):
        raise ValueError("the head 'cosine' gives cosines: for logits choose 'linear'")
    return LinearHead(features, num_classes, **options)
