"""Linear and cosine heads against golden numbers and their definitions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx
from golden_weights import golden_weights

from configs.common import get_config
from mljax.errors import UserError
from mljax.models import build_backbone, build_head, build_model, import_torch
from mljax.models.linear import normalise


def cosine_head(weight: np.ndarray, dtype: str) -> nnx.Module:
    head = build_head("cosine", *weight.shape, rngs=nnx.Rngs(0), dtype=dtype)
    import_torch.load(head, {"classifier.weight": weight})
    return head


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cosine_golden(dtype):
    golden = np.load(shared("golden/heads.npz"))
    bits = dtype.removeprefix("float")
    with jax.enable_x64(dtype == "float64"):
        graph, params = nnx.split(cosine_head(golden["w"], dtype))
        x = jnp.asarray(golden["x"], dtype)[:, None, None]

        def loss(params, x):
            cosines = nnx.merge(graph, params)(x)
            return jnp.sum(cosines * jnp.asarray(golden["coef"], dtype)), cosines

        grad = jax.grad(loss, (0, 1), has_aux=True)
        (grads, grad_x), cosines = grad(params, x)
        grad_w = np.asarray(grads["classifier"]["weight"][...])
        grad_x = np.asarray(grad_x)[:, 0, 0]
        assert cosines.dtype == dtype
    exact = dict(rtol=1e-12, atol=1e-15) if bits == "64" else dict(atol=3e-7)
    np.testing.assert_allclose(cosines, golden[f"cos_f{bits}"], **exact)
    # Rows 0 and 3 are (nearly) zero, 1 and 2 parallel to a class, column 0 is zero:
    # torch's gradients there are about 1e12 or hang on the last bit.
    rtol = 1e-10 if bits == "64" else 1e-4
    rows, columns = [4, 5, 6], slice(3, None)
    expected = golden[f"grad_x_f{bits}"][rows]
    np.testing.assert_allclose(
        grad_x[rows] / np.abs(expected).max(1, keepdims=True),
        expected / np.abs(expected).max(1, keepdims=True),
        rtol=0,
        atol=rtol,
    )
    expected = golden[f"grad_w_f{bits}"][:, columns]
    np.testing.assert_allclose(
        grad_w[:, columns], expected, rtol=0, atol=rtol * np.abs(expected).max()
    )
    assert np.isfinite(grad_x).all() and np.isfinite(grad_w).all()


def test_cosine_starts_with_unit_classes_and_stays_in_range():
    golden = np.load(shared("golden/heads.npz"))["init_column_norms"]
    head = build_head("cosine", 32, 11, rngs=nnx.Rngs(0))
    norms = jnp.linalg.norm(head.classifier.weight[...], axis=0)
    np.testing.assert_allclose(norms, golden, rtol=1e-6)
    x = jnp.tile(head.classifier.weight[...].T[:, None, None], (1, 2, 3, 1))
    cosines = np.asarray(head(1e4 * x))
    np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-6)
    assert np.abs(cosines).max() <= 1


def test_logits_of_bfloat16_features_are_computed_in_float32():
    head = build_head("linear", 64, 5, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (256, 1, 1, 64)).astype(jnp.bfloat16)
    weight, bias = (
        np.asarray(p, np.float64)
        for p in (head.classifier.weight[...], head.classifier.bias[...])
    )
    exact = np.asarray(x, np.float64)[:, 0, 0] @ weight + bias
    np.testing.assert_allclose(head(x), exact, atol=1e-5)


def test_cosine_of_bfloat16_features_is_computed_in_float32():
    head = build_head("cosine", 64, 5, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 64)).astype(jnp.bfloat16)
    cosines = head(x)
    assert cosines.dtype == jnp.float32
    pooled = np.asarray(x, np.float64).mean((1, 2)).astype(jnp.bfloat16)
    pooled, weight = pooled.astype(np.float64), np.asarray(head.classifier.weight[...])
    expected = pooled @ weight / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines, expected, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-13, 1.0, 1e15])
def test_normalise_has_finite_gradients(scale):
    x = scale * jnp.arange(1.0, 5.0)[None]
    value, pull = jax.vjp(lambda x: normalise(x, 1), x)
    (gradient,) = pull(jnp.ones_like(value))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    expected = np.asarray(x) / max(np.linalg.norm(x.astype("float32")), 1e-12)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize(
    ("name", "backbone", "gain"),
    [
        ("mobilenetv3_large_21k", "mobilenetv3_large_100", 1.75),
        ("efficientnetv2_s_21k", "tf_efficientnetv2_s", 1.4),
        ("resnet101", "resnet101", 1.0),
    ],
)
def test_whole_classifier_golden(name, backbone, gain, angular):
    """The PyTorch implementation's own wrapper: pooling, conv_head, classifier.

    With all tensors that it saves, those included which it does not use.
    """
    golden = np.load(shared("golden/backbones.npz"))
    loss = "am_binary" if angular else "asl"
    expected = golden[f"wrapper/{name}/{loss}/logits"]
    config = get_config().model
    config.backbone = backbone
    model = build_model(config, 20, angular=angular, rngs=nnx.Rngs(0))
    shapes = {k: v.shape for k, v in import_torch.export(model).items()}
    stored = json.loads(shared("golden/state_dicts_timm0613.json").read_text())
    heads = stored[f"wrapper/{name}/{loss}"]["state_dict"]
    shapes = {k: v for k, v in shapes.items() if not k.startswith(("fc", "classifier"))}
    shapes |= {k: tuple(v) for k, v in heads}
    import_torch.load(model, golden_weights(shapes, gain))
    image = np.random.default_rng(123).standard_normal((2, 3, 96, 96))
    images = jnp.asarray(image.transpose(0, 2, 3, 1), jnp.float32)
    graph, state = nnx.split(model)
    scores = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    np.testing.assert_allclose(
        scores, expected, rtol=0, atol=1e-3 * np.abs(expected).max()
    )


def test_linear_head_is_its_definition():
    head = build_head(
        "linear", 6, 3, hidden=4, activation="hard_swish", rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 6)).astype(np.float32)
    state = import_torch.export(head)
    hidden = x.mean((1, 2)) @ state["conv_head.weight"][:, :, 0, 0].T
    hidden = hidden + state["conv_head.bias"]
    hidden = hidden * np.clip(hidden + 3, 0, 6) / 6
    expected = hidden @ state["classifier.weight"].T + state["classifier.bias"]
    np.testing.assert_allclose(head(jnp.asarray(x)), expected, atol=1e-5)


def test_the_linear_head_with_cosine_is_the_cosine_head():
    x = jnp.ones((2, 3, 3, 6))
    one, two = (
        build_head("linear", 6, 4, cosine=True, rngs=nnx.Rngs(0)),
        build_head("cosine", 6, 4, cosine=True, rngs=nnx.Rngs(0)),
    )
    np.testing.assert_array_equal(one(x), two(x))
    assert jnp.abs(one(x)).max() <= 1
    with pytest.raises(ValueError, match="for logits choose 'linear'"):
        build_head("cosine", 6, 4, cosine=False, rngs=nnx.Rngs(0))


def test_dropout_acts_in_training_only():
    head = build_head("linear", 8, 3, dropout=0.5, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 2, 2, 8))
    np.testing.assert_array_equal(head(x), head(x, train=False, rngs=nnx.Rngs(1)))
    one, two = (head(x, train=True, rngs=nnx.Rngs(seed)) for seed in (1, 2))
    assert not np.array_equal(one, two)
    with pytest.raises(ValueError, match="rngs"):
        head(x, train=True)


def test_unknown_names_list_the_choices():
    config, rngs = get_config().model, nnx.Rngs(0)
    with pytest.raises(UserError, match="'resnet5'.*mobilenetv3_large_100"):
        build_backbone("resnet5", rngs=rngs)
    with pytest.raises(UserError, match="'liner'.*linear, cosine"):
        build_head("liner", 8, 3, rngs=rngs)
    config.head = "liner"
    with pytest.raises(UserError, match="'liner'"):
        build_model(config, 3, angular=False, rngs=rngs)
    with pytest.raises(ValueError, match="avg, max"):
        build_head("linear", 8, 3, pool="mean", rngs=rngs)
    with pytest.raises(ValueError, match="'gelu'.*prelu"):
        build_head("linear", 8, 3, hidden=4, activation="gelu", rngs=rngs)
