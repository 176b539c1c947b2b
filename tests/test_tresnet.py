"""TResNet against timm's and the original's names, sizes, maps and gradients."""

import jax
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
from golden_weights import golden_weights
from jax import lax

from mljax.errors import UserError
from mljax.models import Classifier, build_head, import_torch, tresnet, tresnet_abn

GAIN = 1.3
ORIGINAL = "ref_TResNetL"  # the PyTorch implementation's v2-L, with InPlace-ABN


def golden(name: str, file: str = "backbones_timm1") -> np.ndarray:
    return np.load(shared(f"golden/{file}.npz"))[name]


@pytest.fixture(scope="module", params=["tresnet_l", "tresnet_v2_l"])
def name_and_model(request) -> tuple[str, nnx.Module]:
    return request.param, golden_backbone(request.param, GAIN)


@pytest.fixture(scope="module")
def original() -> dict[str, np.ndarray]:
    """The original's names, with weights of either sign (|weight| counts)."""
    shapes = {
        name: tuple(shape)
        for name, shape in reference("timm0613", ORIGINAL)["state_dict"]
        if not name.startswith("head")
    }
    return golden_weights(shapes, GAIN)


def test_names_and_shapes_are_timms(name_and_model):
    name, model = name_and_model
    check_names(model, reference("timm1019", name)["state_dict"], "head.fc")


@pytest.mark.parametrize(
    ("name", "count"),  # timm's, without the classifier
    [
        ("tresnet_m", 29_340_032),
        ("tresnet_l", 53_556_256),
        ("tresnet_v2_l", 44_125_824),
    ],
)
def test_parameters(name, count):
    assert parameters(name) == count


def test_map(name_and_model, monkeypatch):
    compile_blocks(monkeypatch)
    name, model = name_and_model
    fmap = nchw(model(image((1, 3, 128, 64), 321)))
    assert_close(fmap, golden(f"{name}/fmap_128x64"))


@pytest.mark.parametrize(
    "name",
    # tresnet_l has both kinds of blocks, v2-L one of them.
    ["tresnet_l", pytest.param("tresnet_v2_l", marks=pytest.mark.slow)],
)
def test_map_and_gradients(name, monkeypatch):
    compile_blocks(monkeypatch)
    arrays = {a: golden(f"{name}/{a}") for a in ("fmap", "pooled", "grad_input")}
    check_gradients(name, GAIN, arrays, reference("timm1019", name)["grad_l2"])


@pytest.mark.parametrize(
    ("name", "shape", "seed"),
    [
        ("fmap_128x64", (1, 3, 128, 64), 321),
        pytest.param("fmap", (2, 3, 96, 96), 123, marks=pytest.mark.slow),
    ],
)
def test_map_of_an_original_checkpoint(name, shape, seed, original, monkeypatch):
    compile_blocks(monkeypatch)
    model = golden_backbone("tresnet_v2_l", GAIN)
    import_torch.load(model, original)
    fmap = nchw(model(image(shape, seed)))
    found = {name: fmap}
    if name == "fmap":
        found["pooled"] = fmap.mean((2, 3))
    for key, value in found.items():
        expected = golden(f"{ORIGINAL}/{key}", "backbones")
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-3 * expected.std())


def test_original_names_and_weights_round_trip(original):
    converted = tresnet_abn.from_original(original)
    back = tresnet_abn.to_original(converted)
    assert back.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_allclose(np.abs(back[name]), np.abs(value), atol=1e-6)
    again = tresnet_abn.from_original(back)
    for name, value in converted.items():
        np.testing.assert_allclose(again[name], value, atol=1e-6)


def test_negative_weights_are_the_same_function_in_the_original():
    make = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = tresnet.ConvBn(3, 8, 3, tresnet.SLOPE, **make)
    random = np.random.default_rng(0)
    for part in ("weight", "bias", "running_mean"):
        value = jnp.asarray(random.standard_normal(8), jnp.float32)
        getattr(layer.bn, part)[...] = value
    x = jnp.asarray(random.standard_normal((1, 5, 5, 3)), jnp.float32)
    expected = layer(x)
    state = {f"conv1.{k}": v for k, v in import_torch.export(layer).items()}
    there = tresnet_abn.to_original(state)
    assert set(there) == {"conv1.0.weight"} | {
        f"conv1.1.{part}" for part in ("weight", "bias", "running_mean", "running_var")
    }
    back = tresnet_abn.from_original(there)
    import_torch.load(layer, {k.removeprefix("conv1."): v for k, v in back.items()})
    assert (layer.bn.weight[...] > 0).all()
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_downsampling_is_its_definition(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    row = np.array([1, 2, 1]) / 4
    weight = np.tile(np.outer(row, row)[:, :, None, None], (1, 1, 1, 3))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = lax.conv_general_dilated(
        padded,
        weight.astype(np.float32),
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(tresnet.blur_pool(jnp.asarray(x)), expected, atol=1e-6)
    means = tresnet.halve(jnp.asarray(x))
    assert means.shape == expected.shape
    np.testing.assert_allclose(means[:, 0, 0], x[:, :2, :2].mean((1, 2)), atol=1e-6)
    inside = x[:, 2 * (means.shape[1] - 1) :, 2 * (means.shape[2] - 1) :]
    np.testing.assert_allclose(means[:, -1, -1], inside.mean((1, 2)), atol=1e-6)


def test_space_to_depth():
    images = jax.random.normal(jax.random.key(0), (1, 8, 4, 3))
    pixels = tresnet.space_to_depth(images)
    assert pixels.shape == (1, 2, 1, 48)
    assert pixels[0, 1, 0, (4 * 2 + 3) * 3 + 1] == images[0, 4 + 2, 3, 1]
    with pytest.raises(UserError, match="divisible by 4, not 10 x 8"):
        tresnet.space_to_depth(jnp.zeros((1, 10, 8, 3)))


def tiny(**options) -> tresnet.TResNet:
    return tresnet.TResNet((1, 1, 1, 2), width=8, rngs=nnx.Rngs(0), **options)


def test_slopes_of_the_last_stage():
    """Of 0 they are ReLU's; else the values below 0 are multiplied."""
    plain, learned = tiny(), tiny(prelu=True)
    blocks = (getattr(learned.body.layer4, name) for name in "01")
    slopes = [block.relu.weight for block in blocks]
    assert [slope[...].tolist() for slope in slopes] == [[0.25], [0.25]]
    pixels = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    for slope in slopes:
        slope[...] = jnp.zeros(1)
    for network in (plain, learned):  # so that there are values below 0
        bias = getattr(network.body.layer4, "1").conv3.bn.bias
        bias[...] = jnp.full(bias.shape, -1.0)
    np.testing.assert_array_equal(learned(pixels), plain(pixels))
    slopes[1][...] = jnp.full(1, 0.5)
    found, expected = learned(pixels), plain(pixels)
    np.testing.assert_array_equal(jnp.maximum(found, 0), expected)
    below = found[expected == 0]
    slopes[1][...] = jnp.full(1, -1.0)
    np.testing.assert_allclose(learned(pixels)[expected == 0], -2 * below, rtol=1e-6)
    assert (below < 0).any()


def test_weights_with_slopes_and_without():
    def classifier(prelu: bool, seed: int) -> Classifier:
        part = tresnet.TResNet((1, 1, 1, 2), width=8, prelu=prelu, rngs=nnx.Rngs(seed))
        head = build_head("linear", part.num_features, 3, rngs=nnx.Rngs(seed))
        return Classifier(part, head)

    names = "body.layer4.0.relu.weight, body.layer4.1.relu.weight"
    plain, learned = classifier(False, 1), classifier(True, 2)
    notes = import_torch.load_pretrained(learned, import_torch.export(plain))
    assert notes == [f"not in the weights, starts anew: {names}"]
    same = classifier(True, 3)
    assert import_torch.load_pretrained(same, import_torch.export(learned)) == []
    (note,) = import_torch.load_pretrained(plain, import_torch.export(learned))
    assert note == f"in the weights, not used by this model: {names}"
