"""Mutual learning: the divergence, and a pair as two networks that know each other."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import bce, identity, make, make_batch, mlp

from configs.common import get_config
from mljax import losses, mutual, results
from mljax.errors import UserError
from mljax.evaluate import Scores
from mljax.optim import make_optimizer
from mljax.progress import Progress
from mljax.run import make_loss
from mljax.step import create_state, make_train_step


def logits(seed, shape=(5, 3), scale=3.0):
    draw = np.random.default_rng(seed)
    return (scale * draw.standard_normal(shape)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_mean_kl_is_that_of_independent_labels():
    target, own = logits(0), logits(1)
    p, q = sigmoid(target), sigmoid(own)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    labels = np.random.default_rng(2).choice([0.0, 1.0, 0.3, -1.0], target.shape)
    assert (labels < 0).any()
    found = mutual.mean_kl(target, own, np.zeros_like(labels))
    np.testing.assert_allclose(found, kl.mean(), rtol=1e-5)
    found = mutual.mean_kl(target, own, labels)
    np.testing.assert_allclose(found, kl[labels >= 0].mean(), rtol=1e-5)
    # A class that nobody annotated changes nothing; bfloat16 is computed in float32.
    wider = [np.pad(x, ((0, 0), (0, 2)), constant_values=3) for x in (target, own)]
    unknown = np.pad(labels, ((0, 0), (0, 2)), constant_values=-1)
    np.testing.assert_allclose(mutual.mean_kl(*wider, unknown), found, rtol=1e-6)
    assert mutual.mean_kl(*wider, np.full_like(unknown, -1)) == 0
    half = [jnp.asarray(x, jnp.bfloat16) for x in (target, own)]
    exact = mutual.mean_kl(*(x.astype(jnp.float32) for x in half), labels)
    assert mutual.mean_kl(*half, labels) == exact
    assert mutual.mean_kl(own, own, labels) == 0


def test_mean_kl_is_finite_for_logits_of_any_size():
    target = jnp.asarray([[-200.0, 200.0, 200.0, -200.0]])
    own = jnp.asarray([[200.0, 200.0, -200.0, 0.0]])
    value, grad = jax.value_and_grad(mutual.mean_kl, 1)(target, own, jnp.zeros((1, 4)))
    np.testing.assert_allclose(value, (200 + 0 + 200 + np.log(2)) / 4, rtol=1e-5)
    np.testing.assert_allclose(grad, [[0.25, 0, -0.25, 0.125]], atol=1e-6)


def test_what_the_other_says_is_a_constant():
    labels = np.random.default_rng(2).integers(0, 2, (5, 3)).astype(np.float32)
    outputs = {"one": logits(0), "two": logits(1)}
    loss = mutual.make_loss(losses.bce, weight=2.0, scale=4.0)
    value, grads = jax.value_and_grad(loss)(outputs, labels)
    expected = 0.0
    for own, other in (("one", "two"), ("two", "one")):
        p, q = sigmoid(4 * outputs[other]), sigmoid(4 * outputs[own])
        alone, of_bce = jax.value_and_grad(losses.bce)(outputs[own], labels)
        kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        expected += alone + 2 * kl.mean()
        # d KL / d logit of q is q - p.
        np.testing.assert_allclose(
            grads[own], of_bce + 2 * 4 * (q - p) / q.size, rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("accumulate", "groups"), [(4, 1), (1, 4), (2, 2)])
def test_the_divergence_of_a_batch_in_parts_is_still_a_mean(
    reduction, accumulate, groups
):
    config = get_config()
    config.loss.reduction = reduction
    config.batch_size = 8
    config.mutual.weight = 50.0
    labels = np.random.default_rng(0).integers(0, 2, (8, 3)).astype(np.float32)
    outputs = {n: np.tanh(logits(i, (8, 3))) for i, n in enumerate(mutual.NETWORKS)}
    whole = make_loss(config, ["a", "b", "c"])(outputs, labels)
    alone = get_config()
    alone.loss.reduction = reduction
    plain = make_loss(alone, ["a", "b", "c"])
    kl = whole - sum(plain(x, labels) for x in outputs.values())
    scaled = {n: config.loss.aam.scale * x for n, x in outputs.items()}
    expected = sum(
        mutual.mean_kl(scaled[a], scaled[b], labels)
        for a, b in (("one", "two"), ("two", "one"))
    )
    np.testing.assert_allclose(kl, 50 * expected, rtol=1e-4)
    config.optim.accumulate, config.sam.groups = accumulate, groups
    of_part = make_loss(config, ["a", "b", "c"])
    parts = [
        of_part({n: x[i::4] for n, x in outputs.items()}, labels[i::4])
        for i in range(4)
    ]
    total = sum(parts) / (4 if reduction == "mean" else 1)
    np.testing.assert_allclose(total, whole, rtol=1e-5)


def test_the_divergence_of_a_part_counts_by_its_images():
    """As in SAM's first pass on every second image: that of half a batch is a half."""
    labels = np.zeros((8, 3), np.float32)
    outputs = {n: logits(i, (8, 3)) for i, n in enumerate(mutual.NETWORKS)}
    pair = mutual.make_loss(lambda own, labels: 0.0, 2.0, 1.0, batch_size=8)
    half = {n: x[::2] for n, x in outputs.items()}
    alone = mutual.make_loss(lambda own, labels: 0.0, 2.0, 1.0)
    np.testing.assert_allclose(pair(half, labels[::2]), alone(half, labels[::2]) / 2)


OPTIONS = {
    "reduction": "sum",
    "seed": 0,
    "sam_rho": 0.05,
    "ema_decay": 0.9,
    "clip_norm": 1.0,
}


def trainer(params, apply, loss, **options):
    """(params, stats) -> the state after some steps, and the last metrics."""
    config = get_config().optim
    config.update(lr=0.05, name="adamw")
    optimizer = make_optimizer(config, 16, 30, params)
    build = partial(make_train_step, apply, loss, optimizer, identity, **OPTIONS)
    step = jax.jit(build(**options))

    def train(params, stats):
        state = create_state(params, stats, optimizer, use_ema=True)
        for i in range(3):
            state, metrics = step(state, make_batch(i))
        return state, metrics

    return train


def start_pair():
    made = {n: make(seed) for seed, n in enumerate(mutual.NETWORKS)}
    return [{n: made[n][i] for n in mutual.NETWORKS} for i in (0, 1)]


def test_without_weight_a_pair_is_two_runs():
    """In all that a step does: norms, perturbations, statistics, averages.

    In float64: the gradient of a bias before BatchNorm is 0 but for rounding, of which
    AdamW would make whole steps.
    """
    with jax.enable_x64(True):
        same_as_two_runs(*jax.tree.map(np.float64, start_pair()))


def same_as_two_runs(params, stats):
    loss = mutual.make_loss(bce, weight=0.0, scale=1.0)
    train_both = trainer(params, mutual.pair(mlp), loss, is_pair=True)
    both, metrics = train_both(params, stats)
    train = trainer(params["one"], mlp, bce)
    losses_alone = []
    for name in mutual.NETWORKS:
        alone, own = train(params[name], stats[name])
        losses_alone.append(own["loss"])
        for field in ("params", "batch_stats", "ema_params", "ema_batch_stats"):
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                getattr(both, field)[name],
                getattr(alone, field),
            )
    np.testing.assert_allclose(metrics["loss"], sum(losses_alone), rtol=1e-5)


def test_with_weight_they_come_to_agree():
    params, stats = start_pair()
    batch = make_batch(9)

    def disagreement(weight):
        loss = mutual.make_loss(bce, weight, scale=1.0)
        train = trainer(params, mutual.pair(mlp), loss, is_pair=True)
        state, _ = train(params, stats)
        outputs, _ = mutual.pair(mlp)(state.params, state.batch_stats, batch["image"])
        return float(mutual.mean_kl(outputs["one"], outputs["two"], batch["labels"]))

    assert disagreement(1000.0) < 0.8 * disagreement(0.0)


def test_each_network_has_dropout_of_its_own():
    one, stats = make()
    images, key = make_batch()["image"], jax.random.key(3)
    apply = partial(mlp, dropout=0.5)
    outputs, _ = mutual.pair(apply)(
        {"one": one, "two": one},
        {"one": stats, "two": stats},
        images,
        train=True,
        rng=key,
    )
    alone, _ = apply(one, stats, images, train=True, rng=key)
    np.testing.assert_array_equal(outputs["one"], alone)
    assert not np.allclose(outputs["one"], outputs["two"])


def test_the_better_network_counts():
    labels = np.eye(4, dtype=np.int8)
    quality = {"raw one": 0.2, "ema one": 0.1, "raw two": 0.4, "ema two": 1.0}
    draw = np.random.default_rng(0).standard_normal((4, 4))
    scores = {
        name: Scores(
            (labels * good + draw * (1 - good)).astype(np.float32),
            labels,
            np.arange(4),
            np.arange(0),
        )
        for name, good in quality.items()
    }
    run = SimpleNamespace(is_pair=True, probabilities=lambda x: x)
    row, per_class = results.row(4, 1, Progress(), scores, run)
    assert (row["weights"], row["network"]) == ("ema", "two")
    assert results.variant(row) == "ema two" and per_class == [1.0] * 4
    assert row["mAP"] == row["mAP_two"] == row["mAP_ema"] == 1.0
    assert row["mAP_one"] < 1 and row["mAP_raw"] < 1
    alone = {kind: scores[f"{kind} two"] for kind in ("raw", "ema")}
    row, _ = results.row(
        4, 1, Progress(), alone, SimpleNamespace(is_pair=False, probabilities=abs)
    )
    assert results.variant(row) == "ema" and "mAP_two" not in row


def test_two_networks_of_the_same_weights_are_refused(monkeypatch):
    config = get_config()
    config.mutual.weight = 1.0
    loaded = {"head": {"weight": np.ones(3)}}
    monkeypatch.setattr(mutual.pretrained, "load", lambda *_: (loaded, {}, []))
    with pytest.raises(UserError, match="init_from = somewhere: gives both networks"):
        mutual.load(config, lambda seed=0: None, [], "somewhere")
