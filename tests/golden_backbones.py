"""Backbones at the golden weights: their maps, gradients and names."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import shared
from flax import nnx
from golden_weights import golden_weights

from mljax.models import blocks, build_backbone, import_torch


def image(shape: tuple[int, ...], seed: int) -> jax.Array:
    """The golden picture of torch's `shape`, as [batch, height, width, 3]."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(values.transpose(0, 2, 3, 1))


def nchw(x: jax.Array) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def assert_close(actual, expected, tolerance=1e-4):
    """Largest difference below `tolerance` of the largest value."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def golden_backbone(name: str, gain: float, **options) -> nnx.Module:
    model = build_backbone(name, rngs=nnx.Rngs(0), **options)
    shapes = {key: x.shape for key, x in import_torch.export(model).items()}
    import_torch.load(model, golden_weights(shapes, gain))
    return model


def reference(file: str, name: str) -> dict:
    """What the golden files tell of a model beside its arrays."""
    return json.loads(shared(f"golden/state_dicts_{file}.json").read_text())[name]


def check_names(model: nnx.Module, names: list, classifier: str) -> None:
    """Our names and shapes are those of the list [[name, shape], ...]."""
    exported = import_torch.export(model)
    assert {name: x.shape for name, x in exported.items()} == {
        name: tuple(shape)
        for name, shape in names
        if not name.startswith(classifier + ".")
    }


def compile_blocks(monkeypatch) -> None:
    """From here on models run outside `jax.jit`, each kind of block compiled once.

    Compiling a whole network, most of whose blocks are equal, takes far longer. In
    evaluation mode only.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(graph, state, x):
        return nnx.merge(graph, state)(x)

    def run(block, x, train, rngs):
        assert not train
        if isinstance(block, blocks.Blocks):
            return block(x)
        return compiled(*nnx.split(block), x)

    monkeypatch.setattr(blocks, "run_once", run)


def parameters(name: str) -> int:
    """How many numbers a backbone learns."""
    model = nnx.eval_shape(lambda: build_backbone(name, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def check_gradients(
    name: str, gain: float, golden: dict[str, np.ndarray], norms: dict[str, float]
) -> None:
    """The map, its mean, and the gradients of sum(map * cos(arange)), in float64.

    In float32 a few ReLUs are on the other side of zero, which is seen in gradients.

    golden: arrays `fmap`, `pooled` and `grad_input`; norms: name -> L2 norm of the
    gradient by that parameter.
    """
    expected = golden["fmap"]
    wave = np.cos(np.arange(expected.size)).reshape(expected.shape)
    with jax.enable_x64(True):
        model = golden_backbone(name, gain, dtype="float64")
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        def loss(params, images):
            fmap = nnx.merge(graph, params, stats)(images)
            return jnp.sum(fmap * wave.transpose(0, 2, 3, 1)), fmap

        (by_param, by_image), fmap = jax.grad(loss, (0, 1), has_aux=True)(
            nnx.to_pure_dict(params), image((2, 3, 96, 96), 123)
        )
        assert fmap.dtype == jnp.float64
        found = {
            ".".join(str(key.key) for key in path): float(jnp.linalg.norm(gradient))
            for path, gradient in jax.tree_util.tree_leaves_with_path(by_param)
        }
    assert_close(nchw(fmap), expected, 1e-10)
    assert_close(nchw(fmap).mean((2, 3)), golden["pooled"], 1e-10)
    assert_close(nchw(by_image), golden["grad_input"])
    assert found.keys() == norms.keys()
    np.testing.assert_allclose(
        [found[name] for name in norms], list(norms.values()), rtol=1e-6
    )
