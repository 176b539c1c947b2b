"""Names in checkpoints of the paper's PyTorch implementation (arXiv 2209.06585).

It wraps timm's networks: their names have "model." before them, under the graph and
ML-Decoder heads "backbone.model.". Its TResNet-L (timm's `tresnet_v2_l`) is its own
and has the original's names without "model.". It stores layers that it never uses:
with AAM an activation `act2`, timm's own `fc` beside its `classifier`, and under the
graph and ML-Decoder heads what timm has after pooling.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mljax.errors import UserError
from mljax.models import Classifier, tresnet_abn
from mljax.models.label_graph import GraphHead
from mljax.models.linear import LinearHead
from mljax.models.ml_decoder import MLDecoder

# DataParallel, torch.compile and NNCF wrap a model; the paper's heads and timm's nets
# are one in the other.
_PREFIXES = re.compile(r"((module|_orig_mod|nncf_module)\.)*(backbone\.)?(model\.)?")
_BACKBONES = (
    "mobilenetv3_large_100",
    "tf_efficientnetv2_s",
    "tf_efficientnetv2_m",
    "tf_efficientnetv2_l",
    "tresnet_m",
    "tresnet_l",
    "tresnet_v2_l",
    "resnet101",
)


def without_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors under timm's names.

    Raises UserError if two tensors would get one name.
    """
    renamed: dict[str, Any] = {}
    for name, value in state_dict.items():
        short = _PREFIXES.sub("", name, count=1)
        if short in renamed:
            raise UserError(f"the weights have two tensors named {short}: {name} too")
        renamed[short] = value
    return renamed


def head_of(state_dict: Collection[str]) -> str:
    """Which head these weights (without prefixes) have, by the names of `HEADS`."""
    for name, head in (
        ("gc1.weight", "gcn"),
        ("gc1.W", "gat"),
        ("decoder.duplicate_pooling", "ml_decoder"),
        ("label_scores.weight", "query2label"),
        ("class_vectors", "csra"),
    ):
        if name in state_dict:
            return head
    return "linear"


def unused(
    state_dict: Collection[str], classifier: str, backbone: Collection[str]
) -> list[str]:
    """What is stored of timm's last layers under another head.

    classifier: timm's name of the last layer; backbone: the names that are used.
    """
    parts = {"classifier", "conv_head", "act2", classifier}
    if classifier == "head" and head_of(state_dict) in ("gcn", "gat"):
        parts.remove("head")  # the graph heads' own classifier
    return [
        name
        for name in state_dict
        if name not in backbone and name.rpartition(".")[0] in parts
    ]


def read_head(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors (PyTorch's layout, without prefixes) tell of their head.

    Returns num_classes (0: there is no last layer), cosine (None: they do not tell) and
    the other sizes that a config has: those of `config.model.NAME`, but for the graph
    heads hidden and embedding_dim.
    """
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    kind = head_of(shapes)
    if kind == "ml_decoder":
        return dict(
            num_classes=shapes["decoder.duplicate_pooling_bias"][0],
            cosine=None,
            groups=shapes["decoder.query_embed.weight"][0],
            dim=shapes["decoder.query_embed.weight"][1],
            feedforward=shapes["decoder.layers.0.linear1.weight"][0],
        )
    if kind == "query2label":
        layers = [n.partition(".")[0] for n in shapes if n.endswith(".norm1.weight")]
        return dict(
            num_classes=shapes["label_scores.weight"][0],
            cosine="label_scores.bias" not in shapes,
            dim=shapes["label_scores.weight"][1],
            feedforward=shapes["decoder.0.linear1.weight"][0],
            encoder_layers=layers.count("encoder"),
            decoder_layers=layers.count("decoder"),
        )
    if kind == "csra":
        _, heads, num_classes = shapes["class_vectors"]
        return dict(num_classes=num_classes, cosine=None, heads=heads)
    names = ["head"] if kind != "linear" else ["classifier", "fc", "head.fc", "head"]
    last = next((name for name in names if f"{name}.weight" in shapes), None)
    if last is None:
        return dict(num_classes=0, cosine=False)
    cosine = f"{last}.bias" not in shapes
    found = dict(num_classes=shapes[f"{last}.weight"][cosine], cosine=cosine)
    if kind != "linear":
        first = "gc1.weight" if kind == "gcn" else "gc1.W"
        found |= dict(hidden=shapes[first][1], embedding_dim=shapes["inp"][1])
    return found


def to_paper(
    name: str,
    model: Classifier,
    backbone: Mapping[str, np.ndarray],
    head: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The state dict that the paper's implementation loads, complete.

    What it stores without using is zero here.

    Args:
        name: of the backbone.
        backbone, head: the two parts of `model` under PyTorch's names and layouts.

    Raises:
        UserError: it has no such backbone or head.
    """
    if name not in _BACKBONES:
        raise UserError(
            f"the paper's implementation has no backbone {name} (it has "
            f"{', '.join(_BACKBONES)}); use --names timm"
        )
    if not isinstance(model.head, LinearHead | GraphHead | MLDecoder):
        raise UserError(
            f"the paper's implementation has no head {type(model.head).__name__}; use "
            "--names timm"
        )
    within: Any = model.backbone
    last, own = within.classifier, name == "tresnet_v2_l"
    linear = isinstance(model.head, LinearHead)
    angular = _is_angular(model.head, head)
    classes, hidden = read_head(head)["num_classes"], within.head_hidden
    outputs = hidden or within.num_features
    logits = dict(weight=_zeros(classes, outputs), bias=_zeros(classes))
    scores = dict(weight=_zeros(outputs, classes)) if angular else logits
    if linear:
        scores = {part: head[f"classifier.{part}"] for part in scores}

    inside = dict(backbone)
    if last == "head.fc":
        inside = tresnet_abn.to_original(inside)
    if own:
        inside |= _under(last, scores)
        if angular and not any(map(tresnet_abn.is_slope, inside)):
            # PReLU in the last stage; with a slope of 0 it is ReLU.
            inside |= {f"body.layer4.{i}.relu.weight": _zeros(1) for i in range(3)}
    else:
        if hidden:
            shape = (hidden, within.num_features, 1, 1)
            empty = dict(weight=_zeros(*shape), bias=_zeros(hidden))
            inside |= _under("conv_head", empty)
        if angular:
            inside["act2.weight"] = _zeros(1)
        if last != "classifier":
            inside |= _under(last, logits if angular else scores)
        if not isinstance(model.head, MLDecoder):
            inside |= _under("classifier", scores)
    if any(map(tresnet_abn.is_slope, inside)) and not (own and angular):
        raise UserError(
            "the paper's implementation has no PReLU (config.model.prelu) in this "
            "network: it has them in tresnet_v2_l with the loss aam; use --names timm"
        )
    outside = dict(head)
    if linear:  # conv_head and act2 that are used
        inside |= {k: v for k, v in head.items() if not k.startswith("classifier.")}
        outside = {}
    prefix = ("" if linear else "backbone.") + ("" if own else "model.")
    return {f"{prefix}{key}": value for key, value in inside.items()} | outside


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _under(layer: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{layer}.{part}": value for part, value in tensors.items()}


def _is_angular(head: Any, tensors: Collection[str]) -> bool:
    if isinstance(head, MLDecoder):
        return head.decoder.cosine
    return "classifier.bias" not in tensors and "head.bias" not in tensors
