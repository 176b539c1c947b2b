"""Query2Label against its equations written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.common import get_config
from mljax.models import build_head, build_model, import_torch
from mljax.models.functional import merge, split
from mljax.models.query2label import sine_positions

DIM, HEADS = 16, 4
WEIGHT = "label_scores.weight"


def tiny(num_classes: int = 5, **options) -> nnx.Module:
    sizes = {"dim": DIM, "heads": HEADS, "feedforward": 32}
    options.setdefault("rngs", nnx.Rngs(0))
    return build_head("query2label", 12, num_classes, **sizes, **options)


def feature_map(batch: int = 3) -> jax.Array:
    x = np.random.default_rng(0).standard_normal((batch, 3, 2, 12))
    return jnp.asarray(x, jnp.float32)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Equations:
    """Post-norm transformer layers, one image and one attention head at a time."""

    def __init__(self, state: dict[str, np.ndarray]):
        self.state = {k: v.astype(np.float64) for k, v in state.items()}

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, name, q, k, v):
        weights = np.split(self.state[f"{name}.in_proj_weight"], 3)
        biases = np.split(self.state[f"{name}.in_proj_bias"], 3)
        q, k, v = (
            x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True)
        )
        size = DIM // HEADS
        heads = []
        for h in range(HEADS):
            own = slice(h * size, (h + 1) * size)
            attention = softmax(q[:, own] @ k[:, own].T / np.sqrt(size))
            heads.append(attention @ v[:, own])
        return self.linear(f"{name}.out_proj", np.concatenate(heads, 1))

    def feedforward(self, name, x):
        hidden = np.maximum(self.linear(f"{name}.linear1", x), 0)
        return self.linear(f"{name}.linear2", hidden)

    def encoder(self, name, x, positions):
        placed = x + positions
        x = self.norm(
            f"{name}.norm1", x + self.attention(f"{name}.self_attn", placed, placed, x)
        )
        return self.norm(f"{name}.norm2", x + self.feedforward(name, x))

    def decoder(self, name, q, x, positions):
        q = self.norm(f"{name}.norm1", q + self.attention(f"{name}.self_attn", q, q, q))
        seen = self.attention(f"{name}.multihead_attn", q, x + positions, x)
        q = self.norm(f"{name}.norm2", q + seen)
        return self.norm(f"{name}.norm3", q + self.feedforward(name, q))

    def scores(self, image, encoders, decoders, cosine):
        height, width, features = image.shape
        weight = self.state["input_proj.weight"][:, :, 0, 0]
        x = image.reshape(-1, features) @ weight.T + self.state["input_proj.bias"]
        positions = sine_positions(height, width, DIM)
        for i in range(encoders):
            x = self.encoder(f"encoder.{i}", x, positions)
        q = self.state["query_embed.weight"]
        for i in range(decoders):
            q = self.decoder(f"decoder.{i}", q, x, positions)
        w = self.state["label_scores.weight"]
        products = (q * w).sum(1)
        if cosine:
            return products / np.linalg.norm(q, axis=1) / np.linalg.norm(w, axis=1)
        return products + self.state["label_scores.bias"]


@pytest.mark.parametrize(
    "cosine, layers", [(False, (1, 2)), (True, (1, 2)), (False, (0, 1))]
)
def test_it_is_its_equations(cosine, layers):
    names = dict(zip(("encoder_layers", "decoder_layers"), layers, strict=True))
    head = tiny(cosine=cosine, **names)
    rng = np.random.default_rng(1)
    # Biases and norms that are not at their start, so that a missing one is seen.
    state = {
        name: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in import_torch.export(head).items()
    }
    import_torch.load(head, state)
    x = feature_map()
    scores = jax.jit(head)(x)
    assert scores.shape == (3, 5) and scores.dtype == jnp.float32
    equations = Equations(state)
    expected = [equations.scores(np.asarray(i, np.float64), *layers, cosine) for i in x]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=2e-5)


def test_positions():
    positions = sine_positions(3, 5, 16)
    assert positions.shape == (15, 16)
    grid = positions.reshape(3, 5, 16)
    # Half of the channels know the row only, half the column only.
    assert (grid[:, :1, :8] == grid[..., :8]).all()
    assert (grid[:1, :, 8:] == grid[..., 8:]).all()
    assert len(np.unique(positions.round(6), axis=0)) == 15
    angle = 2 * np.pi * 2 / 3  # of the second row
    np.testing.assert_allclose(grid[1, 0, :2], [np.sin(angle), np.cos(angle)])
    np.testing.assert_allclose(grid[1, 0, 2], np.sin(angle / 10))
    # The last row is in the same place whatever the size.
    np.testing.assert_allclose(grid[2, 4], sine_positions(6, 9, 16)[-1], atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True])
def test_permuting_labels_permutes_scores(cosine):
    head, order = tiny(cosine=cosine), np.array([3, 0, 4, 1, 2])
    call = jax.jit(lambda params, x: merge(head, params, {})(x))
    params, constants = split(head)
    assert constants == {}
    before = call(params, feature_map())
    permuted = jax.tree.map(lambda x: x, params)
    for name in ("query_embed", "label_scores"):
        permuted[name] = jax.tree.map(lambda x: x[order], permuted[name])
    after = call(permuted, feature_map())
    np.testing.assert_allclose(after, before[:, order], rtol=1e-5, atol=1e-6)


def test_cosines_stay_in_range():
    head = tiny(cosine=True)
    # Each label's vector as its query ends up: the cosine is 1.
    final = jax.jit(head.decode)(feature_map(1))
    head.label_scores.weight[...] = 1e3 * final[0]
    scores = np.asarray(jax.jit(head)(feature_map(1)))
    np.testing.assert_allclose(scores, 1, rtol=1e-5)
    assert scores.max() <= 1
    norms = np.linalg.norm(import_torch.export(tiny(cosine=True))[WEIGHT], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_dropout_acts_in_training_only():
    head = tiny(dropout=0.5, encoder_layers=0, decoder_layers=1)
    train = jax.jit(lambda x, key: head(x, train=True, rngs=nnx.Rngs(key)))
    evaluate = jax.jit(lambda x, key: head(x, rngs=nnx.Rngs(key)))
    one, two = jax.random.split(jax.random.key(0))
    x = feature_map()
    np.testing.assert_array_equal(evaluate(x, one), evaluate(x, two))
    assert not np.allclose(train(x, one), train(x, two))
    with pytest.raises(ValueError, match="rngs"):
        jax.eval_shape(lambda x: head(x, train=True), x)


@pytest.mark.parametrize("cosine", [False, True])
def test_bfloat16_is_close_to_float32(cosine):
    x = 3 * feature_map()
    half = tiny(cosine=cosine, decoder_layers=1, dropout=0.0, dtype=jnp.bfloat16)
    params, _ = split(half)

    def value(params, x):
        scores = merge(half, params, {})(x, train=True)
        return jnp.sum(scores**2), scores

    grads, scores = jax.jit(jax.grad(value, has_aux=True))(
        params, x.astype(jnp.bfloat16)
    )
    assert scores.dtype == jnp.float32
    exact = jax.jit(tiny(cosine=cosine, decoder_layers=1))(x)
    np.testing.assert_allclose(scores, exact, atol=0.1)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_config_reaches_the_head():
    config = get_config().model
    config.backbone, config.head = "tf_mobilenetv3_large_minimal_100", "query2label"
    config.query2label.update(dim=8, heads=2, feedforward=24, dropout=0.3)
    config.query2label.update(encoder_layers=2, decoder_layers=1)
    for angular in (False, True):
        model = nnx.eval_shape(
            lambda angular=angular: build_model(
                config, 3, angular=angular, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
            )
        )
        head = model.head
        assert (head.encoder.length, head.decoder.length) == (2, 1)
        assert (head.label_scores.bias is None) == angular
        assert head.query_embed.weight.shape == (3, 8)
        assert head.input_proj.weight.shape == (1, 1, 960, 8)
        layer = getattr(head.decoder, "0")
        assert layer.linear1.weight.shape == (8, 24)
        assert (layer.dropout, layer.self_attn.heads) == (0.3, 2)
        assert head.dtype == layer.self_attn.dtype == jnp.bfloat16


def test_bad_arguments_are_named():
    for options, message in (
        (dict(encoder_layers=-1), "encoder_layers = -1"),
        (dict(decoder_layers=0), "decoder_layers = 0"),
        (dict(dim=18), "dim = 18: must be a multiple of 4"),
        (dict(dim=20, heads=8), "dim = 20: must be divisible by heads = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            build_head("query2label", 12, 3, rngs=nnx.Rngs(0), **options)
