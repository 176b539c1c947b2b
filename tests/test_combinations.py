"""Every loss with every head on every backbone: a step in bfloat16, saved and loaded.

The backbones are tiny ones of each family. Six combinations, with every backbone,
head and loss among them, always run; the other 114 are marked slow.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_blocks import TINY

from mljax import losses, models, optim, sharding, step
from mljax.checkpoint import Checkpoints, load_variables
from mljax.config import common
from mljax.data import augment
from mljax.label_graph_data import LabelGraph, cooccurrence
from mljax.models.functional import functional
from mljax.word_embeddings import random_embeddings

HEADS = ("linear", "gcn", "gat", "ml_decoder", "query2label", "csra")
CLASSES = [f"label {i}" for i in range(6)]
BATCH = 4

ALL = list(itertools.product(sorted(TINY), HEADS, losses.LOSSES))
FEW = [
    (sorted(TINY)[i % len(TINY)], HEADS[i % len(HEADS)], list(losses.LOSSES)[i % 4])
    for i in range(6)
]


def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "image": draw.integers(0, 255, (BATCH, 64, 64, 3), np.uint8),
        "labels": draw.integers(-1, 2, (BATCH, len(CLASSES))).astype(np.int8),
    }


def settings(backbone: str, head: str, loss: str):
    config = common()
    config.model.backbone, config.model.head = backbone, head
    config.loss.name, config.dtype = loss, "bfloat16"
    small = dict(dim=16, heads=2, feedforward=32)
    config.model.ml_decoder.update(small, groups=4)
    config.model.query2label.update(small)
    config.model.csra.heads = 2
    return config


def make(config) -> models.Classifier:
    labels = np.random.default_rng(1).integers(0, 2, (50, len(CLASSES)))
    graph = LabelGraph(
        CLASSES, cooccurrence(labels), random_embeddings(CLASSES, 8), 0.4, []
    )
    return models.build_model(
        config.model,
        len(CLASSES),
        angular=losses.is_angular(config.loss.name),
        dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(0),
        graph=graph,
    )


def check(backbone: str, head: str, loss: str, folder, monkeypatch) -> None:
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY[backbone])
    config = settings("tiny", head, loss)
    apply, init = functional(lambda: make(config))
    params, stats = init()
    optimizer = optim.make_optimizer(config.optim, BATCH, 10, params)
    state = step.create_state(params, stats, optimizer, use_ema=True)
    run = step.make_train_step(
        apply,
        losses.make_loss(config.loss),
        optimizer,
        augment.make_augment(flip=0.5),
        reduction=config.loss.reduction,
        seed=0,
        ema_decay=0.9,
    )
    state, metrics = jax.jit(run)(state, batch())
    assert metrics["finite"] and np.isfinite(metrics["loss"])
    # The momentum holds the first gradient; residual branches that start at zero have
    # none yet.
    moved = [bool(np.any(x)) for x in jax.tree.leaves(state.opt_state)]
    assert np.mean(moved) > 0.5 and metrics["grad_norm"] > 0

    saved = Checkpoints(folder)
    saved.save(1, state, {"config": config.to_dict(), "class_names": CLASSES})
    saved.wait()
    places = sharding.state_sharding(state, sharding.make_mesh())
    loaded = saved.load(1, sharding.abstract(state, places))
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    weights, _ = load_variables(folder / "1")
    predict = jax.jit(step.make_eval_step(apply, augment.normalise))
    images = batch()["image"]
    scores = predict(weights["params"], weights["batch_stats"], images)
    np.testing.assert_array_equal(
        scores, predict(state.params, state.batch_stats, images)
    )
    assert scores.dtype == jnp.float32 and jnp.isfinite(scores).all()


def test_the_few_have_every_part():
    for every, few in zip(zip(*ALL, strict=True), zip(*FEW, strict=True), strict=True):
        assert set(every) == set(few)


@pytest.mark.parametrize(("backbone", "head", "loss"), FEW)
def test_a_step_and_a_checkpoint(backbone, head, loss, tmp_path, monkeypatch):
    check(backbone, head, loss, tmp_path / "saved", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "head", "loss"), sorted(set(ALL) - set(FEW)))
def test_all_the_others(backbone, head, loss, tmp_path, monkeypatch):
    check(backbone, head, loss, tmp_path / "saved", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_every_registered_backbone_takes_every_head(backbone, head):
    for loss in ("bce", "aam"):
        model = nnx.eval_shape(lambda loss=loss: make(settings(backbone, head, loss)))
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        scores = nnx.eval_shape(lambda m, x: m(x), model, images)
        assert scores.shape == (1, len(CLASSES)) and scores.dtype == jnp.float32
