"""MobileNetV3 against the maps, gradients and statistics of the public models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx
from golden_weights import golden_weights

from configs.common import get_config
from mljax.models import build_backbone, build_model, import_torch, torch_files
from mljax.models.functional import functional, split

GAIN = 1.75
# Compiling is what these tests wait for; the arithmetic is the same.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def image(shape: tuple[int, ...], seed: int) -> jax.Array:
    """The golden picture, [batch, height, width, 3]."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(values.transpose(0, 2, 3, 1))


def nchw(x: jax.Array) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def run(model: nnx.Module, images: jax.Array, jit=quick_jit) -> jax.Array:
    """model(images), compiled with the weights as arguments."""
    graph, state = nnx.split(model)
    return jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)


def golden_backbone(dtype="float32") -> nnx.Module:
    model = build_backbone("mobilenetv3_large_100", rngs=nnx.Rngs(0), dtype=dtype)
    shapes = {name: x.shape for name, x in import_torch.export(model).items()}
    import_torch.load(model, golden_weights(shapes, GAIN))
    return model


def golden(name: str) -> np.ndarray:
    arrays = np.load(shared("golden/backbones.npz"))
    return arrays[f"mobilenetv3_large_100/{name}"]


def reference() -> dict:
    path = shared("golden/state_dicts_timm0613.json")
    return json.loads(path.read_text())["mobilenetv3_large_100"]


def test_names_shapes_and_size_are_timms():
    exported = import_torch.export(
        build_backbone("mobilenetv3_large_100", rngs=nnx.Rngs(0))
    )
    # The file holds the whole model; conv_head and the classifier belong to heads.
    backbone = {
        name: tuple(shape)
        for name, shape in reference()["state_dict"]
        if not name.startswith(("conv_head", "classifier"))
    }
    assert {name: x.shape for name, x in exported.items()} == backbone


@pytest.mark.parametrize(
    ("name", "shape", "seed"),
    [
        ("fmap", (2, 3, 96, 96), 123),
        ("fmap_101x75", (1, 3, 101, 75), 321),
        ("fmap_64x128", (1, 3, 64, 128), 321),
    ],
)
def test_map(name, shape, seed):
    jit = jax.jit if name == "fmap" else quick_jit
    assert_close(nchw(run(golden_backbone(), image(shape, seed), jit)), golden(name))


def test_map_in_float64():
    with jax.enable_x64(True):
        fmap = run(golden_backbone("float64"), image((2, 3, 96, 96), 123))
        assert fmap.dtype == jnp.float64
        assert_close(nchw(fmap), golden("fmap"), 1e-12)


def test_gradients():
    """d sum(fmap * cos(arange)) by the image, and its norm by every parameter."""
    model = golden_backbone()
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    images = image((2, 3, 96, 96), 123)
    wave = np.cos(np.arange(2 * 960 * 9)).reshape(2, 960, 3, 3).transpose(0, 2, 3, 1)

    @quick_jit
    def gradients(params, stats, images):
        def loss(params, images):
            fmap = nnx.merge(graph, params, stats)(images)
            return jnp.sum(fmap * wave), fmap

        return jax.grad(loss, (0, 1), has_aux=True)(params, images)

    (grads, by_image), fmap = gradients(nnx.to_pure_dict(params), stats, images)
    assert_close(nchw(by_image), golden("grad_input"))
    assert_close(np.asarray(fmap).mean((1, 2)), golden("pooled"))
    norms = {
        ".".join(key.key for key in path): float(jnp.linalg.norm(gradient))
        for path, gradient in jax.tree_util.tree_leaves_with_path(grads)
    }
    expected = reference()["grad_l2"]
    assert norms == pytest.approx({name: expected[name] for name in norms}, rel=1e-4)


def test_training_mode_and_running_statistics():
    graph, state = nnx.split(golden_backbone())

    @quick_jit
    def train(state, images):
        model = nnx.merge(graph, state)
        return model(images, train=True), split(model)[1]

    fmap, stats = train(state, image((2, 3, 96, 96), 123))
    assert_close(nchw(fmap), golden("train_fmap"))
    expected = reference()["train_running_stats_after_1_step"]
    for path, value in jax.tree_util.tree_leaves_with_path(stats):
        mean, l2 = expected.pop(".".join(key.key for key in path))
        value = np.asarray(value, np.float64)
        np.testing.assert_allclose(np.linalg.norm(value), l2, rtol=1e-4)
        scale = l2 / np.sqrt(value.size)
        np.testing.assert_allclose(value.mean(), mean, rtol=1e-4, atol=1e-4 * scale)
    assert not expected


@pytest.fixture(scope="module")
def imagenet() -> nnx.Module:
    """The real ImageNet model: a Classifier with timm's 1000 classes."""
    path = shared("weights/tf_mobilenetv3_large_minimal_100.safetensors")
    config = get_config().model
    config.backbone = "tf_mobilenetv3_large_minimal_100"
    model = build_model(config, 1000, angular=False, rngs=nnx.Rngs(0))
    import_torch.load(model, torch_files.read(path).tensors)
    return model


@pytest.mark.parametrize(
    ("name", "shape", "seed"),
    [
        ("fmap", (2, 3, 96, 96), 123),
        ("fmap_101x75", (1, 3, 101, 75), 321),
        ("fmap_64x128", (1, 3, 64, 128), 321),
    ],
)
def test_minimal_map_and_logits(imagenet, name, shape, seed):
    expected = np.load(shared("golden/minimal.npz"))
    fmap = run(imagenet.backbone, image(shape, seed))
    assert_close(nchw(fmap), expected[name])
    assert_close(np.asarray(imagenet.head(fmap)), expected[f"{name}_logits"])


def test_minimal_in_training_mode(imagenet):
    expected = np.load(shared("golden/minimal.npz"))["train_fmap"]
    graph, state = nnx.split(imagenet.backbone)

    @quick_jit
    def train(state, images):
        return nnx.merge(graph, state)(images, train=True)

    assert_close(nchw(train(state, image((2, 3, 96, 96), 123))), expected)


def test_functional_model_starts_fast_and_moves_only_statistics(caplog):
    config = get_config().model
    config.dropout = 0.5

    def make():
        return build_model(config, 5, angular=True, rngs=nnx.Rngs(0))

    with jax.log_compiles():  # of a program for every layer it would take a minute
        apply, init = functional(make)
        params, stats = init()
    assert sum("Finished XLA" in r.getMessage() for r in caplog.records) < 20
    images = image((2, 3, 32, 32), 0)

    @quick_jit
    def both(params, stats, images, key):
        used, kept = apply(params, stats, images)
        trained, moved = apply(params, stats, images, train=True, rng=key)
        return used, kept, trained, moved

    used, kept, trained, moved = both(params, stats, images, jax.random.key(0))
    assert used.shape == trained.shape == (2, 5)
    assert used.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, kept, stats)
    assert jax.tree.structure(moved) == jax.tree.structure(stats)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), moved, stats)
    assert all(jax.tree.leaves(changed))
    for tree in (params, stats):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            assert all(isinstance(key.key, str) for key in path)
            assert leaf.dtype == jnp.float32


def test_bfloat16_activations_are_close_to_float32():
    images, outputs = image((2, 3, 32, 32), 0), {}
    for dtype in ("float32", "bfloat16"):
        model = golden_backbone(dtype)
        assert model.conv_stem.weight[...].dtype == jnp.float32
        outputs[dtype] = run(model, images)
        assert outputs[dtype].dtype == dtype
    assert_close(
        np.asarray(outputs["bfloat16"], np.float32),
        np.asarray(outputs["float32"]),
        0.1,
    )
