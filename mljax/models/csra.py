"""Class-specific residual attention, CSRA (Zhu and Wu 2021, arXiv 2108.02456)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models.layers import draw, wide_einsum
from mljax.models.linear import normalise

# The paper's temperatures for each number of heads. At 99 the attention is nearly a
# maximum over the positions.
TEMPERATURES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (1, 99),
    4: (1, 2, 4, 99),
    6: (1, 2, 3, 4, 5, 99),
    8: (1, 2, 3, 4, 5, 6, 7, 99),
}


class CSRA(nnx.Module):
    """Map [batch, H, W, features] -> scores [batch, num_classes], float32 at least.

    A class's score s_x at position x is the product of the features there and the
    class's vector, scaled to unit length. A head with temperature T gives the paper's
    equation 8,

        mean_x s_x + residual * sum_x softmax_x(T s_x) s_x,

    and the heads, each with class vectors of its own, are added. There is no bias.

    Args:
      cosine: for AAM. The features are scaled to unit length too, and the sum is
        divided by heads * (1 + residual): the scores are in [-1, 1].
      heads: 1, 2, 4, 6 or 8, see `TEMPERATURES`.
      residual: the paper's lambda, weight of the attention.

    Raises ValueError for another number of heads or a negative residual.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        cosine: bool = False,
        heads: int = 1,
        residual: float = 0.1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if heads not in TEMPERATURES:
            raise ValueError(
                f"heads = {heads}: must be one of {', '.join(map(str, TEMPERATURES))}"
            )
        if residual < 0:
            raise ValueError(f"residual = {residual}: must be 0 or more")
        vectors = draw(rngs, "normal", (features, heads, num_classes), 1.0, dtype)
        self.class_vectors = nnx.Param(vectors / jnp.linalg.norm(vectors, axis=0))
        self.heads, self.residual = heads, residual
        self.cosine, self.dtype = cosine, dtype

    def __call__(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        scores = self.position_scores(feature_map)
        temperatures = jnp.asarray(TEMPERATURES[self.heads], scores.dtype)[:, None]
        attention = jax.nn.softmax(temperatures * scores, axis=1)
        attended = jnp.sum(attention * scores, 1)
        each_head = jnp.mean(scores, 1) + self.residual * attended
        if self.cosine:  # a mean, which rounding alone could take out of its range
            return jnp.clip(jnp.mean(each_head, 1) / (1 + self.residual), -1, 1)
        return jnp.sum(each_head, 1)

    def position_scores(self, feature_map: jax.Array) -> jax.Array:
        """Map [batch, H, W, features] -> s [batch, H W, heads, num_classes]."""
        batch, height, width, features = feature_map.shape
        x = feature_map.reshape(batch, height * width, features)
        vectors = normalise(self.class_vectors[...], 0)
        if self.cosine:
            x = normalise(x, 2)
        else:
            x, vectors = x.astype(self.dtype), vectors.astype(self.dtype)
        return wide_einsum(
            "bxf,fhc->bxhc",
            x,
            vectors,
            # As in CosineClassifier: a margin acts on differences below bfloat16's
            # spacing, which accelerators would use inside a float32 product.
            precision=lax.Precision.HIGHEST if self.cosine else None,
        )
