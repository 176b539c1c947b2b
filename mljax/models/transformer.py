"""Attention and transformer layers, with the names of torch's nn.Transformer*Layer.

Post-norm (Vaswani et al. 2017, arXiv 1706.03762): a LayerNorm follows each residual.
Softmax and LayerNorm are computed in float32 at least.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mljax.models import cpu
from mljax.models.layers import (
    LayerNorm,
    Linear,
    constant,
    draw,
    dropout,
    wide_einsum,
)


class MultiHeadAttention(nnx.Module):
    """softmax(q k / sqrt(dim / heads)) v in each head, as torch's MultiheadAttention.

    `in_proj_weight` [dim, 3 dim] makes q, k and v, in this order. It is drawn Xavier
    uniform as one matrix, biases are zero. Raises ValueError unless `heads` divides
    `dim`.
    """

    torch_axes = {"in_proj_weight": (1, 0)}

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or dim % heads:
            raise ValueError(f"dim = {dim}: must be divisible by heads = {heads}")
        bound = math.sqrt(6 / (4 * dim))
        self.in_proj_weight = nnx.Param(
            draw(rngs, "uniform", (dim, 3 * dim), bound, dtype)
        )
        self.in_proj_bias = nnx.Param(constant(0, 3 * dim, dtype))
        self.out_proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.out_proj.bias = nnx.Param(constant(0, dim, dtype))
        self.heads, self.dropout, self.dtype = heads, dropout, dtype

    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Queries look at keys and get a mean of values.

        Args:
          queries: [batch, Q, dim], or [1, Q, dim] if they are the same for all images.
          keys, values: [batch, K, dim].

        Returns [batch, Q, dim].
        """
        weights, v = self.attention(queries, keys), self._project(values, 2)
        if train:
            weights = dropout(weights, self.dropout, rngs)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.dtype), v)
        return self.out_proj(mixed.reshape(*mixed.shape[:2], -1))

    def attention(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """How much each query looks at each key: [batch, heads, Q, K], sums of 1."""
        q, k = self._project(queries, 0), self._project(keys, 1)
        q = jnp.broadcast_to(q, (k.shape[0], *q.shape[1:]))
        scores = wide_einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        return jax.nn.softmax(scores, axis=-1)

    def _project(self, x: jax.Array, part: int) -> jax.Array:
        """[batch, N, dim] -> q, k or v (part 0, 1, 2): [batch, N, heads, size]."""
        dim = x.shape[-1]
        own = slice(part * dim, (part + 1) * dim)
        weight = self.in_proj_weight[:, own].astype(self.dtype)
        x = cpu.product(x.astype(self.dtype), weight)
        x = x + self.in_proj_bias[own].astype(self.dtype)
        return x.reshape(*x.shape[:2], self.heads, -1)


class EncoderLayer(nnx.Module):
    """Positions look at each other, then a feed-forward network with ReLU."""

    def __init__(
        self,
        dim: int,
        heads: int,
        feedforward: int,
        *,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.self_attn = MultiHeadAttention(dim, heads, dropout=dropout, **kinds)
        self.linear1 = Linear(dim, feedforward, **kinds)
        self.linear2 = Linear(feedforward, dim, **kinds)
        self.norm1 = LayerNorm(dim, dtype=dtype)
        self.norm2 = LayerNorm(dim, dtype=dtype)
        self.dropout = dropout

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """x [batch, N, dim], positions [N, dim] -> [batch, N, dim]."""
        rate = self.dropout if train else 0.0
        placed = x + positions
        y = self.self_attn(placed, placed, x, train, rngs)
        x = self.norm1(x + dropout(y, rate, rngs))
        y = dropout(jax.nn.relu(self.linear1(x)), rate, rngs)
        return self.norm2(x + dropout(self.linear2(y), rate, rngs))


class DecoderLayer(nnx.Module):
    """Queries look at each other and at an image, then a feed-forward network.

    Without `self_attention` (ML-Decoder) the queries themselves stand in for what it
    would give, residual, dropout and LayerNorm included.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        feedforward: int,
        *,
        self_attention: bool,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.self_attn = (
            MultiHeadAttention(dim, heads, dropout=dropout, **kinds)
            if self_attention
            else None
        )
        self.multihead_attn = MultiHeadAttention(dim, heads, dropout=dropout, **kinds)
        self.linear1 = Linear(dim, feedforward, **kinds)
        self.linear2 = Linear(feedforward, dim, **kinds)
        self.norm1 = LayerNorm(dim, dtype=dtype)
        self.norm2 = LayerNorm(dim, dtype=dtype)
        self.norm3 = LayerNorm(dim, dtype=dtype)
        self.dropout = dropout

    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """queries [batch, Q, dim], keys and values [batch, K, dim] -> [batch, Q, dim].

        In evaluation the queries may be [1, Q, dim], the same for all images.
        """
        rate = self.dropout if train else 0.0
        x = self._among_themselves(queries, train, rngs)
        y = self.multihead_attn(x, keys, values, train, rngs)
        x = self.norm2(x + dropout(y, rate, rngs))
        y = dropout(jax.nn.relu(self.linear1(x)), rate, rngs)
        return self.norm3(x + dropout(self.linear2(y), rate, rngs))

    def attention(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """How much each query looks at each place of the image, in evaluation.

        Shapes as for a call; returns [batch, heads, Q, K], sums of 1 over K.
        """
        x = self._among_themselves(queries, False, None)
        return self.multihead_attn.attention(x, keys)

    def _among_themselves(
        self, queries: jax.Array, train: bool, rngs: nnx.Rngs | None
    ) -> jax.Array:
        x = y = queries
        if self.self_attn is not None:
            y = self.self_attn(x, x, x, train, rngs)
        return self.norm1(x + dropout(y, self.dropout if train else 0.0, rngs))
