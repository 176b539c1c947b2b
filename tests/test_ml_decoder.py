"""ML-Decoder against golden numbers, and the properties of its parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx
from flax.traverse_util import flatten_dict
from small_model import identity

from configs.common import get_config
from mljax import config as configs
from mljax import losses, optim, sharding
from mljax.errors import UserError
from mljax.models import Classifier, build_head, build_model, import_torch
from mljax.models.batch_norm import BatchNorm
from mljax.models.functional import functional, merge, split
from mljax.models.layers import Conv, Frozen
from mljax.step import create_state, make_train_step

CASES = [
    "c20_g20",
    "c20_g100",
    "c80_g20",
    "c80_g100",
    "c500_g20",
    "c500_g100",
    "c81_g20",
    "c21_g20",
]
QUERIES = "decoder.query_embed.weight"


def golden_head(golden, case: str, loss: str, dtype: str):
    """The head of a golden case with its weights, and its state dict."""
    num_classes, groups = (int(part[1:]) for part in case.split("_"))
    head = build_head(
        "ml_decoder",
        48,
        num_classes,
        cosine=loss == "am_binary",
        groups=groups,
        dim=64,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(0),
    )
    state = {
        name.removeprefix(prefix): golden[name]
        for prefix in ("shared/", f"{case}/")
        for name in golden
        if name.startswith(f"{prefix}decoder.")
    }
    import_torch.load(head, state)
    return head, state


def tiny(num_classes: int = 7, **options) -> nnx.Module:
    options = {"groups": 3, "dim": 16, "heads": 4, "feedforward": 32, **options}
    options.setdefault("rngs", nnx.Rngs(0))
    return build_head("ml_decoder", 12, num_classes, **options)


def feature_map(batch: int = 4, features: int = 12) -> jax.Array:
    x = np.random.default_rng(0).standard_normal((batch, 3, 2, features))
    return jnp.asarray(x, jnp.float32)


def test_every_golden_case_is_listed():
    golden = np.load(shared("golden/ml_decoder.npz"))
    names = {name.split("/")[0] for name in golden} - {"shared", "feature_map"}
    assert names == set(CASES)


@pytest.mark.parametrize("loss", ["am_binary", "asl"])
@pytest.mark.parametrize(
    "case, dtype",
    [(case, "float64") for case in CASES]
    + [("c80_g20", "float32"), ("c81_g20", "float32")],
)
def test_golden(case, loss, dtype):
    golden = np.load(shared("golden/ml_decoder.npz"))
    with jax.enable_x64(dtype == "float64"):
        head, state = golden_head(golden, case, loss, dtype)
        x = jnp.asarray(golden["feature_map"].transpose(0, 2, 3, 1), dtype)
        decoded, logits = jax.jit(lambda x: (head.decoder.decode(x), head(x)))(x)
        assert logits.dtype == dtype
        exported = import_torch.export(head)
    close = dict(rtol=1e-9, atol=1e-13) if dtype == "float64" else dict(atol=2e-5)
    np.testing.assert_allclose(logits, golden[f"{case}/{loss}/logits"], **close)
    if f"{case}/{loss}/decoder_out" in golden:
        expected = golden[f"{case}/{loss}/decoder_out"].transpose(1, 0, 2)
        np.testing.assert_allclose(decoded, expected, **close)
    assert exported.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(exported[name], value)


@pytest.mark.parametrize("loss", ["am_binary", "asl"])
def test_golden_gradients(loss):
    golden = np.load(shared("golden/ml_decoder.npz"))
    prefix = f"c80_g20/{loss}/grad"
    with jax.enable_x64(True):
        head, _ = golden_head(golden, "c80_g20", loss, "float64")
        params, constants = split(head)

        def value(params, x):
            logits = merge(head, params, constants)(x)
            return jnp.sum(logits * jnp.cos(jnp.arange(logits.size)).reshape(3, 80))

        x = jnp.asarray(golden["feature_map"].transpose(0, 2, 3, 1), jnp.float64)
        grads, grad_x = jax.jit(jax.grad(value, (0, 1)))(params, x)
        grads = import_torch.export(merge(head, grads, constants))
    expected = golden[f"{prefix}_feature_map"].transpose(0, 2, 3, 1)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(grad_x, expected, rtol=1e-7, atol=1e-9 * largest)
    names = [n for n in golden if n.startswith(f"{prefix}/decoder.")]
    assert len(names) > 10
    for name in names:
        expected = golden[name]
        atol = 1e-9 * np.abs(expected).max() + 1e-15
        given = grads[name.removeprefix(f"{prefix}/")]
        np.testing.assert_allclose(given, expected, rtol=1e-7, atol=atol, err_msg=name)


class SmallBackbone(nnx.Module):
    """3x3 convolution, BatchNorm, SiLU: the backbone of the golden trajectories."""

    head_hidden = 0
    classifier = "classifier"

    def __init__(self, dtype, rngs: nnx.Rngs):
        self.conv = Conv(3, 16, 3, stride=2, padding=1, dtype=dtype, rngs=rngs)
        self.bn = BatchNorm(16, dtype=dtype)

    def __call__(self, images, train=False, rngs=None):
        return jax.nn.silu(self.bn(self.conv(images), train))


def small_classifier(dtype=jnp.float32, **options) -> Classifier:
    rngs = nnx.Rngs(0)
    head = build_head(
        "ml_decoder", 16, 20, cosine=True, dim=16, dtype=dtype, rngs=rngs, **options
    )
    return Classifier(SmallBackbone(dtype, rngs), head)


def test_golden_trajectory():
    """The whole method: head, AAM, SAM, parameter groups, one-cycle, EMA."""
    golden = np.load(shared("golden/optim.npz"))
    prefix = "e2e_mld/traj/"
    names = [n.removeprefix(prefix) for n in golden if n.startswith(prefix)]
    config = get_config()
    config.optim.update({"lr": 0.05})
    config.loss.aam.update(dict(scale=23.0, margin=0.1, k=0.7, gamma_neg=1.0))
    with jax.enable_x64(True):
        make_model = partial(small_classifier, jnp.float64, groups=8, dropout=0.0)
        model = make_model()
        first = {n.removeprefix("backbone."): golden[prefix + n][0] for n in names}
        import_torch.load(model, first)
        params, stats = split(model)
        apply, _ = functional(make_model)
        optimizer = optim.make_optimizer(config.optim, 8, 12, params)
        state = create_state(params, stats, optimizer, use_ema=True)
        step = make_train_step(
            apply,
            losses.make_loss(config.loss),
            optimizer,
            identity,
            reduction="sum",
            seed=0,
            sam_rho=0.05,
            ema_decay=0.9993,
        )
        step = jax.jit(step)

        def compare(kind, params, stats, i):
            """With golden entry i; the feed-forward's are the last step's only."""
            found = import_torch.export(merge(model, params, stats))
            for name in names:
                expected = golden[f"e2e_mld/{kind}/{name}"]
                if len(expected) < 6 and i < 5:
                    continue
                at = -1 if len(expected) < 6 else i + (kind == "traj")
                np.testing.assert_allclose(
                    found[name.removeprefix("backbone.")],
                    expected[at],
                    rtol=1e-6,
                    atol=1e-9,
                    err_msg=f"{kind} of {name} after step {i}",
                )

        images = jnp.asarray(golden["e2e/X"].transpose(0, 1, 3, 4, 2), jnp.float64)
        labels = jnp.asarray(golden["e2e/Y"], jnp.float64)
        for i in range(6):
            state, metrics = step(state, {"image": images[i], "labels": labels[i]})
            expected = golden["e2e_mld/loss"][i]
            np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
            compare("traj", state.params, state.batch_stats, i)
            compare("ema", state.ema_params, state.ema_batch_stats, i)


def test_queries_stay_as_they_were_drawn(monkeypatch):
    """Whatever the optimiser does to everything else, and sharded."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    config = get_config().optim
    config.update(decay_bias_and_norm=True, weight_decay=0.5, schedule="constant")
    make_model = partial(small_classifier, groups=8, feedforward=64, dropout=0.0)
    params, stats = split(make_model())
    assert not any("query_embed" in path for path in flatten_dict(params))
    apply, _ = functional(make_model)
    optimizer = optim.make_optimizer(config, 8, 3, params)
    state = create_state(params, stats, optimizer, use_ema=True)
    mesh = sharding.make_mesh(2, 4)
    state = sharding.place(state, sharding.state_sharding(state, mesh))
    step = make_train_step(
        apply,
        lambda outputs, labels: jnp.sum((outputs - labels) ** 2),
        optimizer,
        identity,
        reduction="sum",
        seed=0,
        sam_rho=0.05,
        sam_adaptive=True,
        ema_decay=0.9997,
        mesh=sharding.gathered_on(mesh),
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((8, 8, 8, 3)).astype(np.float32),
        "labels": rng.integers(0, 2, (8, 20)).astype(np.float32),
    }
    step = jax.jit(step)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert metrics["finite"]
    before = stats["head"]["decoder"]["query_embed"]["weight"]
    for after in (state.batch_stats, state.ema_batch_stats):
        after = after["head"]["decoder"]["query_embed"]["weight"]
        np.testing.assert_array_equal(after, before)
    moved = flatten_dict(
        jax.tree.map(lambda a, b: np.any(a != b), state.params, params)
    )
    assert all(moved.values()), [path for path in moved if not moved[path]]


def test_queries_are_exported_and_loaded():
    one, other = tiny(), tiny(rngs=nnx.Rngs(1))
    assert isinstance(one.decoder.query_embed.weight, Frozen)
    state = import_torch.export(one)
    assert state[QUERIES].shape == (3, 16)
    assert state["decoder.layers.0.multihead_attn.in_proj_weight"].shape == (48, 16)
    assert state["decoder.duplicate_pooling"].shape == (3, 16, 3)
    assert not np.array_equal(state[QUERIES], import_torch.export(other)[QUERIES])
    import_torch.load(other, state)
    jax.tree.map(np.testing.assert_array_equal, split(one), split(other))


def test_initialisation():
    head = tiny(500, groups=0, dim=32, feedforward=64)
    state = import_torch.export(head)
    assert state[QUERIES].shape == (100, 32)
    np.testing.assert_allclose(state[QUERIES].std(), 1, rtol=0.05)
    pooling = state["decoder.duplicate_pooling"]
    assert pooling.shape == (100, 32, 5)
    np.testing.assert_allclose(
        pooling.std(), np.sqrt(2 / (32 * 5 + 100 * 5)), rtol=0.05
    )
    for name, value in state.items():
        if name.endswith(("in_proj_bias", "out_proj.bias", "pooling_bias")):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == name.endswith("weight")).all(), name
    # Other numbers of groups: never more than labels.
    for groups, kept in ((0, 7), (100, 7), (4, 4)):
        assert import_torch.export(tiny(groups=groups))[QUERIES].shape[0] == kept


@pytest.mark.parametrize("cosine", [False, True])
def test_permuting_groups_permutes_labels(cosine):
    head = tiny(8, groups=4, cosine=cosine)
    before = jax.jit(head)(feature_map())
    state, order = import_torch.export(head), np.array([2, 0, 3, 1])
    labels = (2 * order[:, None] + np.arange(2)).ravel()
    state["decoder.duplicate_pooling_bias"] = np.arange(8, dtype=np.float32)
    for name in (QUERIES, "decoder.duplicate_pooling"):
        state[name] = state[name][order]
    head = tiny(8, groups=4, cosine=cosine)
    import_torch.load(head, state)
    after = jax.jit(head)(feature_map()) - jnp.arange(8.0)
    np.testing.assert_allclose(after, before[:, labels], rtol=1e-5, atol=2e-6)


def test_the_order_of_positions_does_not_matter():
    x = feature_map()
    head = jax.jit(tiny())
    mirrored = head(x[:, ::-1, ::-1])
    np.testing.assert_allclose(mirrored, head(x), rtol=1e-5, atol=1e-6)


def test_cosines_without_bias_stay_in_range():
    head = tiny(cosine=True)
    head.decoder.duplicate_pooling_bias[...] += 0.5
    scores = np.asarray(jax.jit(head)(100 * feature_map(64)))
    assert np.abs(scores - 0.5).max() <= 1 + 1e-6


def test_dropout_acts_in_training_only_and_on_each_image_alone():
    head = tiny(dropout=0.5)
    x = jnp.tile(feature_map(1), (2, 1, 1, 1))
    train = jax.jit(lambda x, key: head(x, train=True, rngs=nnx.Rngs(key)))
    evaluate = jax.jit(lambda x, key: head(x, rngs=nnx.Rngs(key)))
    keys = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(evaluate(x, keys[0]), evaluate(x, keys[1]))
    one, two = (train(x, key) for key in keys)
    assert not np.allclose(one, two)
    assert not np.allclose(one[0], one[1])
    with pytest.raises(ValueError, match="rngs"):
        jax.eval_shape(lambda x: head(x, train=True), x)


@pytest.mark.parametrize("cosine", [False, True])
def test_bfloat16_is_close_to_float32(cosine):
    # Features so large that a softmax or LayerNorm in bfloat16 would be far off.
    x = 30 * feature_map()
    exact = tiny(cosine=cosine, dropout=0.0)
    half = tiny(cosine=cosine, dropout=0.0, dtype=jnp.bfloat16)
    assert half.decoder.query_embed.weight[...].dtype == jnp.float32
    scores = jax.jit(half)(x.astype(jnp.bfloat16))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, jax.jit(exact)(x), atol=0.05)
    params, constants = split(half)

    def value(params):
        return jnp.sum(merge(half, params, constants)(x, train=True) ** 2)

    grads = jax.jit(jax.grad(value))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_config_reaches_the_head():
    config = get_config().model
    config.backbone, config.head = "tf_mobilenetv3_large_minimal_100", "ml_decoder"
    config.ml_decoder.update(groups=2, dim=16, heads=4, feedforward=32, dropout=0.3)
    for angular in (False, True):
        model = nnx.eval_shape(
            lambda angular=angular: build_model(
                config, 5, angular=angular, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
            )
        )
        decoder = model.head.decoder
        assert decoder.cosine is angular
        assert decoder.duplicate_pooling.shape == (2, 16, 3)
        assert decoder.embed_standart.weight.shape == (960, 16)
        layer = getattr(decoder.layers, "0")
        assert layer.linear1.weight.shape == (16, 32)
        attention = layer.multihead_attn
        assert (layer.dropout, attention.dropout, attention.heads) == (0.3, 0.3, 4)
        assert decoder.dtype == attention.dtype == jnp.bfloat16


def test_config_values_that_cannot_work_are_named():
    for key, value, message in (
        ("ml_decoder.heads", 7, r"ml_decoder\.dim = 768: must be divisible by .* = 7"),
        ("ml_decoder.groups", -1, r"ml_decoder\.groups = -1: must be 0 or more"),
        (
            "query2label.heads",
            3,
            r"query2label\.dim = 512: must be divisible by .* = 3",
        ),
        ("query2label.dim", 18, "must be a multiple of 4"),
        ("csra.heads", 3, "must be one of 1, 2, 4, 6, 8"),
    ):
        config = configs.common()
        configs.override(config, f"model.{key}", str(value))
        with pytest.raises(UserError, match=message):
            configs.validate(config)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="groups = -1"):
        tiny(groups=-1)
    with pytest.raises(ValueError, match="dim = 18: must be divisible by heads = 4"):
        tiny(dim=18)
