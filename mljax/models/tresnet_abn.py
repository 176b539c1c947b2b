"""Checkpoints of the original TResNet, trained with InPlace-ABN (Rota Bulo et al. 2018,
arXiv 1712.02616), under timm's names and back.

Where BatchNorm multiplies by `weight`, InPlace-ABN multiplies by |weight| + 1e-5, so
that what it does can be undone. The names differ by torch's Sequential: `conv1.0` and
`conv1.1` are timm's `conv1.conv` and `conv1.bn`; before a blur they are `conv2.0.0` and
`conv2.0.1`. In the skip `downsample.1.0` is `downsample.1.conv`.
"""

import re
from collections.abc import Mapping

import numpy as np

EPS = 1e-5
_SLOPE = re.compile(r"body\.layer4\.\d+\.relu\.weight")


def is_slope(name: str) -> bool:
    """Whether this is of a PReLU of the last stage, which timm's TResNet lacks."""
    return _SLOPE.fullmatch(name) is not None


def without_zero_slopes(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the slopes of PReLUs that are 0, and so those of ReLU."""
    return {k: v for k, v in state_dict.items() if not is_slope(k) or np.any(v)}


def is_original(state_dict: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the original's names and weights, and not timm's."""
    return "body.conv1.0.weight" in state_dict


def from_original(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's names and BatchNorm weights for an original state dict, same function."""
    renamed = {}
    for name, value in state_dict.items():
        name = re.sub(r"(conv\d)\.0\.([01])\.", r"\1.\2.", name)  # before a blur
        name = re.sub(r"(conv\d|downsample\.\d)\.0\.", r"\1.conv.", name)
        name = re.sub(r"(conv\d|downsample\.\d)\.1\.", r"\1.bn.", name)
        if name.endswith("bn.weight"):
            value = np.abs(value) + np.asarray(EPS, value.dtype)
        renamed[name] = value
    return renamed


def to_original(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The original's names and weights for timm's, in [out, in, k, k] layout.

    Same function: where a BatchNorm weight is negative, which |weight| + 1e-5 cannot
    be, the convolution before it and the running mean change their sign instead. A
    weight of less than 1e-5 becomes 1e-5.
    """
    renamed = {}
    for name, value in state_dict.items():
        if name.endswith("num_batches_tracked"):  # InPlace-ABN does not count
            continue
        layer, _, last = name.rpartition(".")
        block, _, part = layer.rpartition(".")
        if part in ("conv", "bn"):
            weight = state_dict[f"{block}.bn.weight"]
            sign = np.where(weight < 0, -1, 1).astype(weight.dtype)
            if last == "running_mean":
                value = value * sign
            elif part == "conv":
                value = value * sign[:, None, None, None]
            elif last == "weight":
                value = np.maximum(np.abs(value) - np.asarray(EPS, value.dtype), 0)
            inner = "0." if _is_blurred(block, state_dict) else ""
            name = f"{block}.{inner}{'0' if part == 'conv' else '1'}.{last}"
        renamed[name] = value
    return renamed


def _is_blurred(layer: str, state_dict: Mapping[str, np.ndarray]) -> bool:
    """Whether a blur follows: after the first 3x3 of a block that halves the map."""
    block, _, conv = layer.rpartition(".")
    if f"{block}.downsample.1.conv.weight" not in state_dict:
        return False
    return conv == ("conv2" if f"{block}.conv3.conv.weight" in state_dict else "conv1")
