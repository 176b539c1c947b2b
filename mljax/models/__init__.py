"""Backbones, heads, and the classifier made of one of each.

Adding one is a file and a line in a dict. A backbone is made with `rngs`, `dtype`,
`drop_path` and `remat`, called with images [batch, H, W, 3], `train` and `rngs`, and
says how many channels its map has (`num_features`); linear heads have a hidden layer
if it says how wide (`head_hidden`, with `head_activation`). A head is made with the
channels, the number of classes, `cosine` (the scores are cosines), `dtype`, `rngs` and
what `config.model.NAME` holds, if that is there; it is called with the map, `train` and
`rngs`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from mljax.errors import UserError
from mljax.label_graph_data import LabelGraph
from mljax.models import (
    csra,
    efficientnetv2,
    label_graph,
    linear,
    ml_decoder,
    mobilenetv3,
    query2label,
    resnet,
    tresnet,
    vit,
)

BACKBONES: dict[str, Callable[..., nnx.Module]] = {
    "mobilenetv3_large_100": mobilenetv3.mobilenetv3_large_100,
    "tf_mobilenetv3_large_minimal_100": mobilenetv3.tf_mobilenetv3_large_minimal_100,
    "tf_efficientnetv2_s": efficientnetv2.tf_efficientnetv2_s,
    "tf_efficientnetv2_m": efficientnetv2.tf_efficientnetv2_m,
    "tf_efficientnetv2_l": efficientnetv2.tf_efficientnetv2_l,
    "tresnet_m": tresnet.tresnet_m,
    "tresnet_l": tresnet.tresnet_l,
    "tresnet_v2_l": tresnet.tresnet_v2_l,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "vit_tiny_patch16_224": vit.vit_tiny_patch16_224,
    "vit_small_patch16_224": vit.vit_small_patch16_224,
    "vit_base_patch16_224": vit.vit_base_patch16_224,
}
HEADS: dict[str, Callable[..., nnx.Module]] = {
    "linear": linear.LinearHead,
    "cosine": linear.cosine,
    "ml_decoder": ml_decoder.MLDecoder,
    "query2label": query2label.Query2Label,
    "csra": csra.CSRA,
    "gcn": label_graph.gcn,
    "gat": label_graph.gat,
}


class Classifier(nnx.Module):
    """images [batch, H, W, 3], normalised -> scores [batch, num_classes], float32."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module):
        self.backbone, self.head = backbone, head

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        return self.head(self.backbone(images, train, rngs), train, rngs)


def _find(kind: str, name: str, registry: Mapping[str, Callable]) -> Callable:
    if name not in registry:
        raise UserError(f"unknown {kind} {name!r}; choose {', '.join(registry)}")
    return registry[name]


def build_backbone(
    name: str, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **options: Any
) -> nnx.Module:
    """A backbone with random weights; all have the options `drop_path` and `remat`.

    UserError lists the names if it is unknown.
    """
    return _find("backbone", name, BACKBONES)(rngs=rngs, dtype=dtype, **options)


def build_head(
    name: str, features: int, num_classes: int, *, rngs: nnx.Rngs, **options: Any
) -> nnx.Module:
    """A head for maps of `features` channels; `options` are those of its class.

    UserError lists the names if it is unknown. ValueError: a number is below 1.
    """
    if features < 1 or num_classes < 1:
        raise ValueError(
            f"features = {features}, num_classes = {num_classes}: must be at least 1"
        )
    return _find("head", name, HEADS)(features, num_classes, rngs=rngs, **options)


def build_model(
    model_config: ConfigDict,
    num_classes: int,
    *,
    angular: bool,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    graph: LabelGraph | None = None,
) -> Classifier:
    """The classifier that `config.model` describes.

    angular: the loss works on cosines (aam), so that every head gives cosines.
    graph: for the heads "gcn" and "gat", whose constants it becomes; without it they
      have placeholders, to be replaced by those of a checkpoint.
    """
    is_tresnet = model_config.backbone.startswith("tresnet")
    own = {"prelu": True} if model_config.prelu and is_tresnet else {}
    backbone: Any = build_backbone(
        model_config.backbone,
        rngs=rngs,
        dtype=dtype,
        drop_path=model_config.drop_path,
        remat=model_config.remat,
        **own,
    )
    name = model_config.head
    options: dict[str, Any] = {}
    if name in ("linear", "cosine"):
        angular = angular or name == "cosine"
        name = "cosine" if angular else "linear"
        options = dict(
            pool=model_config.pool,
            dropout=model_config.dropout,
            hidden=getattr(backbone, "head_hidden", 0),
            activation=getattr(backbone, "head_activation", "relu"),
        )
        if angular:
            options["activation"] = "prelu"
    elif name in ("gcn", "gat"):
        options = dict(
            pool=model_config.pool,
            dropout=model_config.dropout,
            cosine=angular,
            tau=model_config.graph.tau,
            rho=model_config.graph.rho,
            hidden_dim_scale=model_config.graph.hidden_dim_scale,
            attention_dropout=model_config.graph.attention_dropout,
        )
        if graph is not None:
            options["adjacency"] = graph.cooccurrence
            options["embeddings"] = graph.embeddings
    elif name in HEADS:
        options = dict(model_config.get(name, {}), cosine=angular)
    head = build_head(
        name, backbone.num_features, num_classes, rngs=rngs, dtype=dtype, **options
    )
    return Classifier(backbone, head)


def folded(model: Classifier) -> Classifier:
    """`model` for use: a graph head's gate, equal for all images, is computed once.

    The scores stay the same (`label_graph.fold`); other models come back as they are.
    """
    head: Any = label_graph.fold(model.head)
    return model if head is model.head else Classifier(model.backbone, head)
