"""Label-graph heads "gcn" and "gat": which labels go together weighs the channels.

Two graph layers turn an embedding of each label into a vector of `features` numbers;
the largest over the labels, through a sigmoid, is a gate for each channel of the map.
The gate is the same for every image: at inference it is a constant (`fold`).

Prokofiev and Sovrasov, "Combining Metric Learning and Attention Heads" (2022),
arXiv 2209.06585; the graph is that of ML-GCN, Chen et al. (2019), arXiv 1904.03582,
section 3.4.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models.layers import (
    Frozen,
    Linear,
    at_least_float32,
    draw,
    dropout,
    pool,
)
from mljax.models.linear import CosineClassifier, LinearHead
from mljax.word_embeddings import random_embeddings


def threshold(A: np.ndarray, tau: float = 0.4, rho: float = 0.25) -> np.ndarray:
    """Co-occurrence -> weighted edges with self-loops, float64 [labels, labels].

    Edges are the pairs with P(j | i) >= tau; the edges into a label j share the weight
    rho; every label keeps itself with weight 1 (ML-GCN has 1 - rho there). So rho = 0
    is the graph without edges.

    Args:
      A: [labels, labels], row i holds P(j | i).
      tau: smallest probability that makes an edge.
      rho: weight of the neighbours.
    """
    edges = (np.asarray(A) >= tau).astype(np.float64)
    return edges * rho / (edges.sum(0) + 1e-6) + np.eye(len(edges))


def normalise(A):
    """(A D)^T D with D = diag(row sums of A)^-1/2; numpy or jax [labels, labels].

    The transpose makes label j gather from the labels i that point to it. A row of
    zeros gives NaN; after `threshold` there is none.
    """
    scale = A.sum(1) ** -0.5
    return (A * scale).T * scale


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """In full float32: the graph is small, and its maximum decides the gate."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


class GraphConvolution(nnx.Module):
    """adjacency @ x @ weight: [labels, inputs] -> [labels, outputs], without a bias.

    weight [inputs, outputs] uniform +-1/sqrt(outputs). Kipf and Welling (2017),
    equation 2, arXiv 1609.02907.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(outputs)
        self.weight = nnx.Param(draw(rngs, "uniform", (inputs, outputs), bound, dtype))

    def __call__(
        self,
        x: jax.Array,
        adjacency: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        weight = self.weight[...].astype(x.dtype)
        # With many labels the product with the adjacency is the dear one: it is taken
        # where the vectors are shorter. (Of the embeddings it has no gradient either.)
        if weight.shape[0] < weight.shape[1]:
            return _matmul(_matmul(adjacency, x), weight)
        return _matmul(adjacency, _matmul(x, weight))


class GraphAttention(nnx.Module):
    """One-head graph attention: [labels, inputs] -> [labels, outputs], through ELU.

    Label i attends to the labels j with adjacency[i, j] > 0, with scores
    leaky_relu(a1 . h_i + a2 . h_j, 0.2), where h = x W and a = (a1, a2). A label
    without any such j attends to all alike. W [inputs, outputs] and a [2 outputs, 1]
    are Xavier uniform with gain 1.414. Velickovic et al. (2018), equations 1 to 4,
    arXiv 1710.10903.

    Args:
      dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dropout: float = 0.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def xavier(rows: int, columns: int) -> nnx.Param:
            bound = 1.414 * math.sqrt(6 / (rows + columns))
            return nnx.Param(draw(rngs, "uniform", (rows, columns), bound, dtype))

        self.W, self.a = xavier(inputs, outputs), xavier(2 * outputs, 1)
        self.dropout = dropout

    def __call__(
        self,
        x: jax.Array,
        adjacency: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        h = _matmul(x, self.W[...].astype(x.dtype))
        a1, a2 = jnp.split(self.a[...].astype(x.dtype), 2)
        scores = jax.nn.leaky_relu(_matmul(h, a1) + _matmul(h, a2).T, 0.2)
        # Finite, so that a label without neighbours gives no NaN.
        scores = jnp.where(adjacency > 0, scores, -9e15)
        attention = jax.nn.softmax(scores, -1)
        if train:
            attention = dropout(attention, self.dropout, rngs)
        return jax.nn.elu(_matmul(attention, h))


class GraphHead(nnx.Module):
    """Map [batch, H, W, features] -> scores [batch, num_classes] in float32 at least.

    pool -> gate -> dropout -> classifier. The gate multiplies the pooled vector
    instead of the map: it is not negative, so that both means and maxima commute with
    it. Gate and classifier are computed in float32 at least.

    `A` (after `threshold`) and `inp` (the embeddings) are constants: saved and
    exported, never trained or averaged.

    Args:
      layer: "gcn" or "gat".
      adjacency: P(j | i) in row i, [num_classes, num_classes], before `threshold`.
        None: no edges; every label stands alone.
      embeddings: [num_classes, any]. None: the random vectors of
        `random_embeddings` for the labels "0", "1", ...
      tau, rho: see `threshold`.
      hidden_dim_scale: the first layer gives features / hidden_dim_scale numbers.
      attention_dropout: of "gat", in training.
      cosine: scores are cosines, for AAM, instead of logits.
      pool: "avg", "max" or "avg+max".
      dropout: share of the features dropped in training.

    Raises ValueError for an unknown layer or pool, or arrays of another shape.
    """

    # What this run's config and labels decide, whatever weights it starts from.
    from_data = ("A", "inp")

    def __init__(
        self,
        layer: str,
        features: int,
        num_classes: int,
        *,
        adjacency: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
        tau: float = 0.4,
        rho: float = 0.25,
        hidden_dim_scale: float = 1.0,
        attention_dropout: float = 0.1,
        cosine: bool = False,
        pool: str = "avg",
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if layer not in ("gcn", "gat"):
            raise ValueError(f"layer is {layer!r}; choose gcn or gat")
        if pool not in ("avg", "max", "avg+max"):
            raise ValueError(f"pool is {pool!r}; choose avg, max or avg+max")
        if adjacency is None:
            adjacency = np.zeros((num_classes, num_classes))
        if embeddings is None:
            embeddings = random_embeddings([str(i) for i in range(num_classes)])
        embeddings = np.asarray(embeddings)
        if np.shape(adjacency) != (num_classes, num_classes):
            raise ValueError(
                f"adjacency is {np.shape(adjacency)} for {num_classes} labels"
            )
        if np.ndim(embeddings) != 2 or len(embeddings) != num_classes:
            raise ValueError(
                f"embeddings are {np.shape(embeddings)} for {num_classes} labels"
            )
        self.A = Frozen(jnp.asarray(threshold(adjacency, tau, rho), jnp.float32))
        self.inp = Frozen(jnp.asarray(embeddings, jnp.float32))
        hidden = max(1, int(features / hidden_dim_scale))
        sizes = (embeddings.shape[1], hidden), (hidden, features)
        self.gc1, self.gc2 = (
            GraphConvolution(*size, dtype=dtype, rngs=rngs)
            if layer == "gcn"
            else GraphAttention(
                *size, dropout=attention_dropout, dtype=dtype, rngs=rngs
            )
            for size in sizes
        )
        classifier = CosineClassifier if cosine else Linear
        self.head = classifier(
            features, num_classes, dtype=at_least_float32(dtype), rngs=rngs
        )
        self.pool, self.dropout = pool, dropout
        self.dtype = at_least_float32(dtype)

    def gate(self, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The weight of each channel, in [0, 1]: [features]."""
        adjacency = normalise(self.A[...].astype(self.dtype))
        x = self.inp[...].astype(self.dtype)
        for layer in (self.gc1, self.gc2):
            x = jax.nn.leaky_relu(layer(x, adjacency, train, rngs), 0.2)
        return jax.nn.sigmoid(jnp.max(x, 0))

    def __call__(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        x = pool(feature_map, self.pool).astype(self.dtype) * self.gate(train, rngs)
        if train:
            x = dropout(x, self.dropout, rngs)
        return self.head(x)


class FoldedHead(nnx.Module):
    """A cosine GraphHead for inference: its gate as one vector `gate` [features]."""

    def __init__(self, gate: jax.Array, head: CosineClassifier, pool: str):
        self.gate, self.head, self.pool = Frozen(gate), head, pool

    def __call__(
        self,
        feature_map: jax.Array,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        pooled = pool(feature_map, self.pool)
        return self.head(pooled.astype(self.gate[...].dtype) * self.gate[...])


def fold(head: nnx.Module) -> nnx.Module:
    """The same head for inference, without the graph; another kind comes back as is.

    A linear classifier takes the gate into its weights, for every pooling, and becomes
    a plain `LinearHead`. A cosine classifier normalises the features, so there the
    gate stays as one vector (`FoldedHead`). Only for inference: the graph layers would
    no longer be trained.
    """
    if not isinstance(head, GraphHead):
        return head
    gate, classifier = head.gate(), head.head
    if isinstance(classifier, CosineClassifier):
        return FoldedHead(gate, classifier, head.pool)
    size, rngs = classifier.weight[...].shape, nnx.Rngs(0)
    gated = Linear(*size, dtype=head.dtype, rngs=rngs)
    gated.weight[...] = gate[:, None] * classifier.weight[...]
    gated.bias[...] = classifier.bias[...]
    folded = LinearHead(*size, pool=head.pool, dtype=head.dtype, rngs=rngs)
    folded.classifier = gated
    return folded


def gcn(features: int, num_classes: int, **options) -> GraphHead:
    """A head with graph convolutions; options as in `GraphHead`."""
    return GraphHead("gcn", features, num_classes, **options)


def gat(features: int, num_classes: int, **options) -> GraphHead:
    """A head with graph attention; options as in `GraphHead`."""
    return GraphHead("gat", features, num_classes, **options)
