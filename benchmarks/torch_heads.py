"""The heads in PyTorch, for the benchmarks' peers, from the tensors of our export.

A head maps [batch, features, H, W] -> cosines [batch, classes] in float32. What does
not change in training (graph, embeddings, fixed queries) is no parameter and no part of
the state dict, so that neither optimiser nor EMA spends time on it; and the graph is
normalised once. Such care is what the heads of a user who looks at speed would have.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]


def cosines(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = F.normalize(x.float()), F.normalize(weight.float(), dim=0)
    return (x @ weight).clamp(-1, 1)


class Cosine(nn.Module):
    """pool -> (1x1 convolution -> PReLU, with MobileNetV3) -> cosines."""

    def __init__(self, weights: Weights, conv_head: nn.Module | None):
        super().__init__()
        self.weight = nn.Parameter(weights["classifier.weight"])
        self.conv_head = conv_head
        if conv_head is not None:
            self.act2 = nn.PReLU()
            self.act2.weight.data = weights["act2.weight"]

    def forward(self, fmap: Tensor) -> Tensor:
        x = fmap.mean((2, 3))
        if self.conv_head is not None:
            x = self.act2(self.conv_head(x[:, :, None, None])[:, :, 0, 0])
        return cosines(x, self.weight)


def normalised(edges: Tensor) -> Tensor:
    """(A D)^T D with D the row sums to the power of -1/2: [labels, labels]."""
    scale = edges.sum(1) ** -0.5
    return (edges * scale).T * scale


class GCN(nn.Module):
    """Kipf and Welling (2017): graph @ x @ W, twice."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.register_buffer("graph", normalised(weights["A"]), persistent=False)
        self.gc1 = nn.Parameter(weights["gc1.weight"])
        self.gc2 = nn.Parameter(weights["gc2.weight"])

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.gc1, self.gc2):
            x = F.leaky_relu(self.graph @ (x @ weight), 0.2)
        return x


class GAT(nn.Module):
    """Velickovic et al. (2018), twice; one head, dropout 0.1 on the attention."""

    def __init__(self, weights: Weights):
        super().__init__()
        absent = normalised(weights["A"]) <= 0
        self.register_buffer("absent", absent, persistent=False)
        for name in ("gc1.W", "gc1.a", "gc2.W", "gc2.a"):
            self.register_parameter(name.replace(".", "_"), nn.Parameter(weights[name]))

    def forward(self, x: Tensor) -> Tensor:
        for weight, a in ((self.gc1_W, self.gc1_a), (self.gc2_W, self.gc2_a)):
            h = x @ weight
            a1, a2 = a.chunk(2)
            scores = F.leaky_relu(h @ a1 + (h @ a2).T, 0.2)
            attention = scores.masked_fill(self.absent, -9e15).softmax(1)
            attention = F.dropout(attention, 0.1, self.training)
            x = F.leaky_relu(F.elu(attention @ h), 0.2)
        return x


class Graph(nn.Module):
    """Label-graph re-weighting, the paper's section on it: two graph layers make a gate
    for every channel, the same for all images.

    layers: of the tensors; embeddings [labels, 300] -> [labels, features].
    """

    def __init__(
        self,
        layers: Callable[[Weights], nn.Module],
        weights: Weights,
        conv_head: nn.Module | None,
    ):
        super().__init__()
        self.layers = layers(weights)
        self.register_buffer("labels", weights["inp"], persistent=False)
        self.weight = nn.Parameter(weights["head.weight"])
        self.folded: Tensor | None = None

    def gate(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.sigmoid(self.layers(self.labels).amax(0))

    def fold(self) -> None:
        """For inference: the gate is computed once."""
        with torch.no_grad():
            self.folded = self.gate()

    def forward(self, fmap: Tensor) -> Tensor:
        gate = self.gate() if self.folded is None else self.folded
        # It is not negative, so that pooling first gives the same.
        return cosines(fmap.mean((2, 3)).float() * gate, self.weight)


class MLDecoder(nn.Module):
    """Ridnik et al. (2021): fixed queries look at the map, one decoder layer without
    self-attention; each answers for its group of labels."""

    def __init__(self, weights: Weights, conv_head: nn.Module | None):
        super().__init__()
        given = {n.removeprefix("decoder."): x for n, x in weights.items()}
        queries = given.pop("query_embed.weight")
        self.register_buffer("queries", queries, persistent=False)
        dim, features = given["embed_standart.weight"].shape
        hidden = len(given["layers.0.linear1.weight"])
        self.project = nn.Linear(features, dim)
        self.attention = nn.MultiheadAttention(dim, 8, 0.1, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.groups = nn.Parameter(given.pop("duplicate_pooling"))
        self.bias = nn.Parameter(given.pop("duplicate_pooling_bias"))
        renamed = {"embed_standart": "project", "layers.0.multihead_attn": "attention"}
        state = {"groups": self.groups.data, "bias": self.bias.data}
        for name, x in given.items():
            for old, new in renamed.items():
                name = name.replace(old, new)
            state[name.removeprefix("layers.0.")] = x
        self.load_state_dict(state)

    def forward(self, fmap: Tensor) -> Tensor:
        def drop(x: Tensor) -> Tensor:
            return F.dropout(x, 0.1, self.training)

        x = F.leaky_relu(self.project(fmap.flatten(2).transpose(1, 2)), 0.2)
        q = self.queries.expand(len(x), -1, -1)
        q = self.norm1(q + drop(q))
        q = self.norm2(q + drop(self.attention(q, x, x, need_weights=False)[0]))
        y = self.linear2(drop(F.relu(self.linear1(q))))
        q = self.norm3(q + drop(y)).float()
        with torch.autocast(q.device.type, enabled=False):
            groups = F.normalize(self.groups, dim=1)
            scores = torch.einsum("bgd,gdc->bgc", F.normalize(q, dim=2), groups)
        return scores.flatten(1)[:, : len(self.bias)] + self.bias


HEADS = {
    "linear": Cosine,
    "gcn": partial(Graph, GCN),
    "gat": partial(Graph, GAT),
    "ml_decoder": MLDecoder,
}
