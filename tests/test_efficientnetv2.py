"""EfficientNetV2 against timm's names, sizes, maps and gradients."""

import numpy as np
import pytest
from conftest import shared
from flax import nnx
from golden_backbones import (
    assert_close,
    check_gradients,
    check_names,
    compile_blocks,
    golden_backbone,
    image,
    nchw,
    parameters,
    reference,
)

NAME, GAIN = "tf_efficientnetv2_s", 1.4


def golden(name: str) -> np.ndarray:
    return np.load(shared("golden/backbones.npz"))[f"{NAME}/{name}"]


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    return golden_backbone(NAME, GAIN)


def test_names_and_shapes_are_timms(model):
    check_names(model, reference("timm0613", NAME)["state_dict"], "classifier")


@pytest.mark.parametrize(
    ("name", "count"),  # timm's, without the classifier
    [
        ("tf_efficientnetv2_s", 20_177_488),
        ("tf_efficientnetv2_m", 52_858_356),
        ("tf_efficientnetv2_l", 117_234_272),
    ],
)
def test_parameters(name, count):
    assert parameters(name) == count


@pytest.mark.parametrize(
    ("name", "shape"),
    [("fmap_101x75", (1, 3, 101, 75)), ("fmap_64x128", (1, 3, 64, 128))],
)
def test_map_of_odd_sizes(model, monkeypatch, name, shape):
    compile_blocks(monkeypatch)
    assert_close(nchw(model(image(shape, 321))), golden(name))


def test_map_and_gradients(monkeypatch):
    compile_blocks(monkeypatch)
    arrays = {name: golden(name) for name in ("fmap", "pooled", "grad_input")}
    check_gradients(NAME, GAIN, arrays, reference("timm0613", NAME)["grad_l2"])
