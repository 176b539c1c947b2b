"""ML-Decoder (Ridnik et al. 2021, arXiv 2111.12933): fixed queries look at the map.

Parameter names are those of the paper's PyTorch implementation.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models.layers import Frozen, Linear, Stack, constant, draw, wide_einsum
from mljax.models.linear import normalise
from mljax.models.transformer import DecoderLayer

MOST_GROUPS = 100  # unless the config asks for more


class Queries(nnx.Module):
    """`weight` [groups, dim], drawn N(0, 1) once and never trained."""

    def __init__(self, groups: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = Frozen(draw(rngs, "normal", (groups, dim), 1.0, dtype))


class Decoder(nnx.Module):
    """Map [batch, H, W, features] -> scores [batch, num_classes], float32 at least.

    The map is projected to `dim`; each group's query, frozen, gathers from all
    positions through one decoder layer without self-attention; from what it has
    gathered come the scores of its ceil(num_classes / groups) labels.

    Args:
      cosine: for AAM. The scores are cosines plus a learned bias, so that they can
        leave [-1, 1] a little, and the projection has a leaky ReLU instead of a ReLU.
      groups: queries, at most num_classes; 0 = min(100, num_classes).
      dim: width of the decoder.
      heads: attention heads.
      feedforward: hidden units of the decoder's feed-forward network.
      dropout: rate in the decoder layer, on attention weights too.

    Raises ValueError if groups is negative or `heads` does not divide `dim`.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        cosine: bool = False,
        groups: int = 0,
        dim: int = 768,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if groups < 0:
            raise ValueError(f"groups = {groups}: must be 0 (automatic) or more")
        groups = min(groups or MOST_GROUPS, num_classes)
        columns = math.ceil(num_classes / groups)  # labels of one group
        self.embed_standart = Linear(features, dim, dtype=dtype, rngs=rngs)
        self.query_embed = Queries(groups, dim, dtype=dtype, rngs=rngs)
        layer = DecoderLayer(
            dim,
            heads,
            feedforward,
            self_attention=False,
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.layers = Stack([layer])
        # Xavier normal, as torch counts it with three axes: fan in dim * columns, fan
        # out groups * columns.
        std = math.sqrt(2 / ((dim + groups) * columns))
        self.duplicate_pooling = nnx.Param(
            draw(rngs, "normal", (groups, dim, columns), std, dtype)
        )
        self.duplicate_pooling_bias = nnx.Param(constant(0, num_classes, dtype))
        self.cosine, self.dtype = cosine, dtype

    def __call__(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        return self.classify(self.decode(feature_map, train, rngs))

    def decode(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Map [batch, H, W, features] -> one vector a group [batch, groups, dim]."""
        queries, x = self._inputs(feature_map)
        if train:  # each image has its own dropout
            queries = jnp.broadcast_to(queries, (len(x), *queries.shape[1:]))
        return getattr(self.layers, "0")(queries, x, x, train, rngs)

    def attention(self, feature_map: jax.Array) -> jax.Array:
        """Where each group's query looks, the mean over the attention heads.

        Map [batch, H, W, features] -> [batch, groups, H W], sums of 1.
        """
        queries, x = self._inputs(feature_map)
        return jnp.mean(getattr(self.layers, "0").attention(queries, x), 1)

    def _inputs(self, feature_map: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the decoder layer: [1, groups, dim] and [batch, H W, dim]."""
        batch, height, width, features = feature_map.shape
        x = self.embed_standart(feature_map.reshape(batch, height * width, features))
        x = jax.nn.leaky_relu(x, 0.2) if self.cosine else jax.nn.relu(x)
        return self.query_embed.weight[...].astype(self.dtype)[None], x

    def classify(self, decoded: jax.Array) -> jax.Array:
        """[batch, groups, dim] -> [batch, num_classes].

        Label c is column c % columns of group c // columns; the last columns may have
        no label.
        """
        weight, bias = self.duplicate_pooling[...], self.duplicate_pooling_bias[...]
        if self.cosine:
            decoded, weight = normalise(decoded, 2), normalise(weight, 1)
        scores = wide_einsum(
            "bgd,gdc->bgc",
            decoded,
            weight.astype(decoded.dtype),
            # As in CosineClassifier: a margin acts on differences below bfloat16's
            # spacing, which accelerators would use inside a float32 product.
            precision=lax.Precision.HIGHEST if self.cosine else None,
        )
        return scores.reshape(scores.shape[0], -1)[:, : len(bias)] + bias


class MLDecoder(nnx.Module):
    """The head: a `Decoder`, under the name that the reference's parameters have.

    Options, shapes and errors are those of `Decoder`.
    """

    def __init__(self, features: int, num_classes: int, **options):
        self.decoder = Decoder(features, num_classes, **options)

    def __call__(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        return self.decoder(feature_map, train, rngs)
