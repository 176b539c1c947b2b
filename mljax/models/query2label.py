"""Query2Label (Liu et al. 2021, arXiv 2107.10834): a learned query for each label."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mljax.models.layers import Conv, Stack, draw
from mljax.models.linear import normalise
from mljax.models.transformer import DecoderLayer, EncoderLayer


def sine_positions(height: int, width: int, dim: int) -> np.ndarray:
    """Where each position of a map is, as sines and cosines: float64 [H W, dim].

    Half of the channels tell the row and half the column, which run from 0 (excluded)
    to 2 pi whatever the size of the map. Channel pairs have the wavelengths of Vaswani
    et al. 2017 (section 3.5) in these units. `dim` is a multiple of 4.
    """
    pairs = dim // 4
    frequencies = 10_000.0 ** (-np.arange(pairs) / pairs)

    def encode(count: int) -> np.ndarray:
        angles = 2 * np.pi * np.arange(1, count + 1)[:, None] / count * frequencies
        return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(count, dim // 2)

    rows = np.repeat(encode(height), width, axis=0)
    columns = np.tile(encode(width), (height, 1))
    return np.concatenate([rows, columns], axis=1)


class LabelQueries(nnx.Module):
    """`weight` [num_classes, dim], drawn N(0, 1) and learned."""

    def __init__(self, num_classes: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(draw(rngs, "normal", (num_classes, dim), 1.0, dtype))


class LabelScores(nnx.Module):
    """One score a label: w_c . q_c + b_c, or with `cosine` the cosine of the two.

    weight [num_classes, dim], uniform +-1/sqrt(dim) as is the bias; with `cosine`
    N(0, 1) scaled to unit length, no bias, the result clipped to [-1, 1].
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        cosine: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape, bound = (num_classes, dim), 1 / math.sqrt(dim)
        if cosine:
            weight = draw(rngs, "normal", shape, 1.0, dtype)
            self.weight = nnx.Param(weight / jnp.linalg.norm(weight, axis=1)[:, None])
            self.bias = None
        else:
            self.weight = nnx.Param(draw(rngs, "uniform", shape, bound, dtype))
            self.bias = nnx.Param(draw(rngs, "uniform", shape[:1], bound, dtype))

    def __call__(self, queries: jax.Array) -> jax.Array:
        """queries [batch, num_classes, dim] -> [batch, num_classes]."""
        weight = self.weight[...]
        if self.bias is None:
            cosines = jnp.sum(normalise(queries, 2) * normalise(weight, 1), -1)
            return jnp.clip(cosines, -1, 1)
        return jnp.sum(queries.astype(weight.dtype) * weight, -1) + self.bias[...]


class Query2Label(nnx.Module):
    """Map [batch, H, W, features] -> scores [batch, num_classes], float32 at least.

    A 1x1 convolution projects the map to `dim`. Encoder layers let its positions look
    at each other; decoder layers let the queries, one a label, look at each other and
    at the map; from query c comes the score of label c. Where the map is looked at,
    the keys know their positions and the values do not (section 3.2 of the paper).

    Args:
      cosine: for AAM: the scores are cosines, in [-1, 1].
      dim: width of the transformer, a multiple of 4 and of `heads`.
      heads: attention heads.
      feedforward: hidden units of the feed-forward networks.
      encoder_layers, decoder_layers: how many of each.
      dropout: rate in all layers, on attention weights too.

    Raises ValueError for a `dim` that does not fit or numbers of layers below 0 (1
    for the decoder).
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        cosine: bool = False,
        dim: int = 512,
        heads: int = 8,
        feedforward: int = 2048,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
        dropout: float = 0.1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if encoder_layers < 0:
            raise ValueError(f"encoder_layers = {encoder_layers}: must be 0 or more")
        if decoder_layers < 1:
            raise ValueError(f"decoder_layers = {decoder_layers}: must be 1 or more")
        if dim % 4:
            raise ValueError(f"dim = {dim}: must be a multiple of 4")
        shared: dict[str, Any] = dict(dropout=dropout, dtype=dtype, rngs=rngs)
        self.input_proj = Conv(
            features, dim, 1, bias=True, uniform=True, dtype=dtype, rngs=rngs
        )
        self.query_embed = LabelQueries(num_classes, dim, dtype=dtype, rngs=rngs)
        self.encoder = Stack(
            EncoderLayer(dim, heads, feedforward, **shared)
            for _ in range(encoder_layers)
        )
        self.decoder = Stack(
            DecoderLayer(dim, heads, feedforward, self_attention=True, **shared)
            for _ in range(decoder_layers)
        )
        self.label_scores = LabelScores(
            num_classes, dim, cosine=cosine, dtype=dtype, rngs=rngs
        )
        self.dtype = dtype

    def __call__(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        return self.label_scores(self.decode(feature_map, train, rngs))

    def decode(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Map [batch, H, W, features] -> one vector a label, [batch, labels, dim]."""
        queries, keys, values = self._before_last(feature_map, train, rngs)
        return self._last(queries, keys, values, train, rngs)

    def attention(self, feature_map: jax.Array) -> jax.Array:
        """Where each label's query looks in the last layer, the mean over its heads.

        Map [batch, H, W, features] -> [batch, num_classes, H W], sums of 1.
        """
        queries, keys, _ = self._before_last(feature_map, False, None)
        return jnp.mean(self._last.attention(queries, keys), 1)

    @property
    def _last(self) -> DecoderLayer:
        return getattr(self.decoder, str(self.decoder.length - 1))

    def _before_last(
        self, feature_map: jax.Array, train: bool, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [batch, num_classes, dim], keys and values [batch, H W, dim] of the
        last decoder layer."""
        batch, height, width, _ = feature_map.shape
        x = self.input_proj(feature_map)
        dim = x.shape[-1]
        x = x.reshape(batch, height * width, dim)
        positions = jnp.asarray(sine_positions(height, width, dim), self.dtype)
        for i in range(self.encoder.length):
            x = getattr(self.encoder, str(i))(x, positions, train, rngs)
        queries = self.query_embed.weight[...].astype(self.dtype)
        queries = jnp.broadcast_to(queries, (batch, *queries.shape))
        for i in range(self.decoder.length - 1):
            layer = getattr(self.decoder, str(i))
            queries = layer(queries, x + positions, x, train, rngs)
        return queries, x + positions, x
