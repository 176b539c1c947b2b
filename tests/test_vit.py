"""ViT: its definition in numpy, position embeddings, timm's names and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_backbones import parameters
from scipy.special import erf, softmax

from mljax.errors import UserError
from mljax.models import import_torch, vit


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    ("name", "count"),  # timm's, without the classifier
    [
        ("vit_tiny_patch16_224", 5_524_416),
        ("vit_small_patch16_224", 21_665_664),
        ("vit_base_patch16_224", 85_798_656),
    ],
)
def test_parameters(name, count):
    assert parameters(name) == count


def small(**options) -> vit.VisionTransformer:
    return vit.VisionTransformer(8, 2, rngs=nnx.Rngs(0), depth=2, **options)


def test_names_and_shapes_are_timms():
    state = import_torch.export(small())
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    layers = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in layers]
    assert state.keys() == {"cls_token", "pos_embed"} | {
        f"{layer}.{part}"
        for layer in ("patch_embed.proj", *layers, "norm")
        for part in ("weight", "bias")
    }
    assert state["cls_token"].shape == (1, 1, 8)
    assert state["pos_embed"].shape == (1, 197, 8)
    assert state["patch_embed.proj.weight"].shape == (8, 3, 16, 16)
    assert state["blocks.1.attn.qkv.weight"].shape == (24, 8)
    assert state["blocks.1.mlp.fc1.weight"].shape == (32, 8)
    assert state["blocks.1.mlp.fc2.weight"].shape == (8, 32)


def test_map_is_its_definition():
    """The paper's equations 1 to 4, in numpy, float64."""
    with jax.enable_x64(True):
        model = small(image_size=48, dtype="float64")
        state = {
            name: normal(i, *x.shape) / np.sqrt(np.prod(x.shape[1:]) + 1)
            for i, (name, x) in enumerate(import_torch.export(model).items())
        }
        import_torch.load(model, state)
        images = normal(99, 2, 48, 48, 3)
        actual = np.asarray(jax.jit(model)(jnp.asarray(images)))
        assert actual.dtype == np.float64

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    squares = images.reshape(2, 3, 16, 3, 16, 3).transpose(0, 1, 3, 5, 2, 4)
    weight = state["patch_embed.proj.weight"].reshape(8, -1)
    patches = squares.reshape(2, 9, -1) @ weight.T + state["patch_embed.proj.bias"]
    x = np.concatenate([np.tile(state["cls_token"], (2, 1, 1)), patches], 1)
    x = x + state["pos_embed"]
    for i in range(2):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(2, 10, 3, 2, 4).transpose(2, 0, 3, 1, 4)
        heads = softmax(q @ k.transpose(0, 1, 3, 2) / 2, -1) @ v
        merged = heads.transpose(0, 2, 1, 3).reshape(2, 10, 8)
        x = x + linear(merged, f"blocks.{i}.attn.proj")
        y = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        x = x + linear(y, f"blocks.{i}.mlp.fc2")
    expected = norm(x, "norm")[:, 1:].reshape(2, 3, 3, 8)
    np.testing.assert_allclose(actual, expected, atol=1e-10)


def test_other_image_sizes():
    model = small()
    forward = jax.jit(model)
    assert forward(jnp.zeros((1, 448, 448, 3))).shape == (1, 28, 28, 8)
    assert forward(jnp.zeros((2, 32, 80, 3))).shape == (2, 2, 5, 8)
    other = small()  # whose positions are those of 2 rows and 5 columns from the start
    other.pos_embed = type(model.pos_embed)(
        vit.resize_positions(model.pos_embed[...], (2, 5))
    )
    picture = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 80, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "resize_positions", lambda positions, shape: positions)
        expected = jax.jit(other)(picture)
    np.testing.assert_allclose(forward(picture), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="divisible by 16, not 40 x 32"):
        model(jnp.zeros((1, 40, 32, 3)))
    with pytest.raises(ValueError, match="image_size = 230"):
        small(image_size=230)


def test_positions_are_resized_smoothly():
    """A plane stays a plane inside; the class token's embedding is not touched."""
    rows, columns = np.mgrid[0:14, 0:14] + 0.5
    grid = np.stack([rows / 14, columns / 14], -1).reshape(1, 196, 2)
    positions = jnp.asarray(np.concatenate([np.full((1, 1, 2), 7.0), grid], 1))
    assert vit.resize_positions(positions, (14, 14)) is positions
    resized = np.asarray(vit.resize_positions(positions, (28, 7)))
    assert resized.shape == (1, 1 + 28 * 7, 2)
    assert (resized[0, 0] == 7).all()
    rows, columns = np.mgrid[0:28, 0:7] + 0.5
    expected = np.stack([rows / 28, columns / 7], -1)
    inside = (slice(6, -6), slice(2, -2))
    actual = resized[0, 1:].reshape(28, 7, 2)
    np.testing.assert_allclose(actual[inside], expected[inside], atol=1e-3)


def test_weights_for_another_size_are_resized_when_loaded():
    state = import_torch.export(small(image_size=64))
    model = small(image_size=96)
    import_torch.load(model, state)
    resized = vit.resize_positions(jnp.asarray(state["pos_embed"]), (6, 6))
    np.testing.assert_array_equal(model.pos_embed[...], resized)
    state["pos_embed"] = state["pos_embed"][:, :11]
    with pytest.raises(UserError, match="pos_embed"):
        import_torch.load(model, state)
