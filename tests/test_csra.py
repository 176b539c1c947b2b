"""CSRA against its equation written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.common import get_config
from mljax.models import build_head, build_model, import_torch
from mljax.models.csra import TEMPERATURES
from mljax.models.functional import merge, split


def tiny(num_classes: int = 5, **options) -> nnx.Module:
    return build_head("csra", 8, num_classes, rngs=nnx.Rngs(0), **options)


def feature_map(batch: int = 3) -> jax.Array:
    x = np.random.default_rng(0).standard_normal((batch, 3, 2, 8))
    return jnp.asarray(x, jnp.float32)


def equation(image, vectors, heads: int, residual: float, cosine: bool):
    """One image [H, W, features] -> [num_classes], a class and a head at a time."""
    x = np.asarray(image, np.float64).reshape(-1, image.shape[-1])
    if cosine:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    scores = np.zeros(vectors.shape[-1])
    for c in range(len(scores)):
        for head, temperature in enumerate(TEMPERATURES[heads]):
            m = vectors[:, head, c].astype(np.float64)
            s = x @ (m / np.linalg.norm(m))
            attention = np.exp(temperature * (s - s.max()))
            attention /= attention.sum()
            scores[c] += s.mean() + residual * (attention * s).sum()
    return scores / (heads * (1 + residual)) if cosine else scores


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("heads, residual", [(1, 0.1), (2, 0.0), (4, 0.5), (8, 2.0)])
def test_it_is_its_equation(heads, residual, cosine):
    head = tiny(heads=heads, residual=residual, cosine=cosine)
    # Vectors of any length mean the same.
    head.class_vectors[...] *= jnp.arange(1.0, 6.0)
    x = feature_map()
    scores = jax.jit(head)(x)
    assert scores.dtype == jnp.float32
    vectors = import_torch.export(head)["class_vectors"]
    expected = [equation(i, vectors, heads, residual, cosine) for i in x]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_initial_vectors_have_unit_length():
    vectors = import_torch.export(tiny(heads=4))["class_vectors"]
    assert vectors.shape == (8, 4, 5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize("heads", TEMPERATURES)
def test_cosines_stay_in_range(heads):
    head = tiny(heads=heads, residual=3.0, cosine=True)
    # Maps that are a class's vector everywhere, or its opposite: the extremes.
    head.class_vectors[...] = jnp.tile(head.class_vectors[:, :1], (1, heads, 1))
    x = jnp.tile(head.class_vectors[:, 0].T[:, None, None], (1, 3, 2, 1))
    scores = np.asarray(jax.jit(head)(jnp.concatenate([7 * x, -7 * x])))
    np.testing.assert_allclose(np.diag(scores[:5]), 1, rtol=1e-6)
    np.testing.assert_allclose(np.diag(scores[5:]), -1, rtol=1e-6)
    assert np.abs(scores).max() <= 1


def test_high_temperature_looks_at_the_best_position():
    x = jnp.zeros((1, 3, 2, 8)).at[0, 1, 1].set(1.0)
    head = tiny(1, heads=2, residual=1.0)
    head.class_vectors[...] = jnp.ones((8, 2, 1))
    best = np.sqrt(8)
    mean = best / 6
    soft = np.exp(best) * best / (np.exp(best) + 5)
    expected = 2 * mean + soft + best
    np.testing.assert_allclose(head(x)[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_permuting_labels_permutes_scores(cosine):
    head, order = tiny(heads=4, cosine=cosine), np.array([3, 0, 4, 1, 2])
    before = head(feature_map())
    head.class_vectors[...] = head.class_vectors[...][..., order]
    np.testing.assert_allclose(head(feature_map()), before[:, order], atol=1e-6)


@pytest.mark.parametrize("cosine", [False, True])
def test_bfloat16_and_empty_positions_are_finite(cosine):
    head = tiny(heads=4, cosine=cosine, dtype=jnp.bfloat16)
    assert head.class_vectors[...].dtype == jnp.float32
    # A ReLU leaves positions at which all features are zero.
    x = (3 * feature_map()).at[:, 1].set(0).at[0].set(0).astype(jnp.bfloat16)
    params, constants = split(head)
    assert constants == {}

    def value(params, x):
        scores = merge(head, params, {})(x)
        return jnp.sum(scores**2), scores

    grads, scores = jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, x)
    assert scores.dtype == jnp.float32
    exact = tiny(heads=4, cosine=cosine)(x.astype(jnp.float32))
    np.testing.assert_allclose(scores, exact, atol=0.1)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((grads, scores)))


def test_config_reaches_the_head():
    config = get_config().model
    config.backbone, config.head = "tf_mobilenetv3_large_minimal_100", "csra"
    config.csra.update(heads=6, residual=0.4)
    for angular in (False, True):
        model = nnx.eval_shape(
            lambda angular=angular: build_model(
                config, 3, angular=angular, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
            )
        )
        head = model.head
        assert (head.cosine, head.heads, head.residual) == (angular, 6, 0.4)
        assert head.class_vectors.shape == (960, 6, 3)
        assert head.dtype == jnp.bfloat16


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="heads = 3: must be one of 1, 2, 4, 6, 8"):
        tiny(heads=3)
    with pytest.raises(ValueError, match="residual = -1"):
        tiny(residual=-1)
