"""ResNet against timm's names, sizes, maps and gradients."""

import jax.numpy as jnp
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

from mljax.models import build_backbone, cpu
from mljax.models.resnet import max_pool

NAME, TIMM, GAIN = "resnet101", "tv_resnet101", 1.0


def golden(name: str) -> np.ndarray:
    return np.load(shared("golden/backbones.npz"))[f"{TIMM}/{name}"]


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    return golden_backbone(NAME, GAIN)


def test_names_and_shapes_are_timms(model):
    check_names(model, reference("timm0613", TIMM)["state_dict"], "fc")


@pytest.mark.parametrize(
    ("name", "count"),  # timm's, without the classifier
    [("resnet50", 23_508_032), ("resnet101", 42_500_160)],
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
    check_gradients(NAME, GAIN, arrays, reference("timm0613", TIMM)["grad_l2"])


def test_blocks_start_as_their_skips():
    block = getattr(build_backbone("resnet50", rngs=nnx.Rngs(0)).layer1, "1")
    x = jnp.abs(jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 256))))
    np.testing.assert_array_equal(block(x), x)


def test_max_pool_of_odd_sizes():
    x = -jnp.arange(1.0, 16).reshape(1, 3, 5, 1)  # below the border's zeros, if any
    expected = [[-1, -2, -4], [-6, -7, -9]]
    np.testing.assert_array_equal(max_pool(x)[0, ..., 0], expected)
    with cpu.plain_forms():
        np.testing.assert_array_equal(max_pool(x)[0, ..., 0], expected)
