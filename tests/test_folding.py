"""A model for use is the folded one: the same scores, through a saved checkpoint."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_networks import SMALL
from test_blocks import TINY
from test_label_graph import some_graph

from mljax import checkpoint, results
from mljax import config as configs
from mljax.data import DATASETS
from mljax.evaluate_workdir import evaluate_workdir
from mljax.label_graph_data import LabelGraph
from mljax.models import BACKBONES, build_backbone, folded
from mljax.models.batch_norm import BatchNorm
from mljax.models.fixed import fixed
from mljax.models.functional import as_function, split
from mljax.models.label_graph import GraphHead
from mljax.run import make_run

POOLS = ("avg", "max", "avg+max")


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name, make in SMALL.items():
        monkeypatch.setitem(BACKBONES, name, make)


@functools.cache
def shapes():
    config = configs.load("configs/shapes.py", "debug")
    config.data.num_val = 16
    return DATASETS["shapes"](config.data, 0)


def a_run(folder, head="gcn", loss="aam", pool="avg"):
    """A run of 14 classes, as configs/shapes.py has, with a best checkpoint."""
    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone, config.model.head = "small_resnet", head
    config.model.pool, config.loss.name = pool, loss
    config.eval.batch_size, config.data.num_val = 16, 16
    graph = some_graph(14)
    names = shapes().val.class_names
    graph = LabelGraph(names, graph["adjacency"], graph["embeddings"], 0.4, [])
    run = make_run(config, names, graph if head in ("gcn", "gat") else None)
    params, batch_stats = split(run.make_model())
    saves = checkpoint.Checkpoints(folder / "best")
    variables = {"params": params, "batch_stats": batch_stats}
    about = {"config": config.to_dict(), "class_names": names}
    saves.save(1, variables, about)
    saves.close()
    # As --mode=eval builds it: the graph is that of the checkpoint.
    return config, make_run(config, names), variables


@pytest.mark.parametrize("loss", ["aam", "bce"])
@pytest.mark.parametrize("head", ["gcn", "gat"])
def test_scores_of_a_saved_run_are_the_same(head, loss, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
    for pool in POOLS:
        folder = tmp_path / pool
        _, run, variables = a_run(folder, head, loss, pool)
        used, found, about = results.best_weights(run, folder)
        assert len(about["class_names"]) == 14
        plain = run.eval_step(variables["params"], variables["batch_stats"], images)
        scores = used.eval_step(found["params"], found["batch_stats"], images)
        assert plain.shape == scores.shape == (16, 14)
        np.testing.assert_allclose(scores, plain, rtol=0, atol=1e-6)
        assert np.ptp(np.asarray(plain)) > 0.05
        names = set(found["params"]["head"]) | set(found["batch_stats"].get("head", ()))
        assert names == ({"head", "gate"} if loss == "aam" else {"classifier"})


def test_evaluation_never_runs_the_graph(tmp_path, monkeypatch, capsys):
    config, _, _ = a_run(tmp_path)

    def unused(*args, **kwargs):
        raise AssertionError("the graph head was run")

    monkeypatch.setattr(GraphHead, "__call__", unused)
    found = evaluate_workdir(config, str(tmp_path))
    assert found["step"] == 1
    assert json.loads((tmp_path / "eval.json").read_text())["mAP"] == found["mAP"]
    assert "mAP" in capsys.readouterr().out


def test_an_imported_directory_is_evaluated_as_it_is(tmp_path):
    config, run, variables = a_run(tmp_path / "run")
    about = checkpoint.load_variables(tmp_path / "run" / "best" / "1")[1]
    checkpoint.save_variables(tmp_path / "imported", variables, about)
    there = evaluate_workdir(config, str(tmp_path / "imported"))
    config.eval.batch_size = 13  # not shared by the devices as it is
    here = evaluate_workdir(config, str(tmp_path / "run"))
    assert there.pop("step") == 0 and here.pop("step") == 1
    assert here == there
    # With eval.json in it, it is still a checkpoint.
    assert checkpoint.load_variables(tmp_path / "imported")[1] == about


@pytest.mark.parametrize("trained", [False, True])
def test_an_evaluation_takes_prelus_from_the_weights(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "tresnet", TINY["tresnet"])
    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone, config.model.prelu = "tresnet", trained
    config.data.image_size, config.data.num_val = 32, 16
    run = make_run(config, DATASETS["shapes"](config.data, config.seed).val.class_names)
    params, batch_stats = split(run.make_model())
    about = {"config": config.to_dict(), "class_names": run.class_names}
    variables = {"params": params, "batch_stats": batch_stats}
    checkpoint.save_variables(tmp_path / "imported", variables, about)
    same = evaluate_workdir(config, str(tmp_path / "imported"))
    config.model.prelu = not trained
    assert evaluate_workdir(config, str(tmp_path / "imported")) == same


def test_other_models_come_back_as_they_are(tmp_path):
    _, run, variables = a_run(tmp_path, "linear")
    model = run.make_model()
    assert folded(model) is model
    used, found, _ = results.best_weights(run, tmp_path)
    assert used is run  # nothing is compiled again
    jax.tree.map(np.testing.assert_array_equal, found, variables)


@pytest.mark.parametrize(
    "backbone",
    [
        "small_mobile",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in sorted(set(BACKBONES) - set(SMALL))
        ),
    ],
)
@jax.enable_x64(True)
def test_a_fixed_network_is_the_same_function(backbone):
    # In float32 what is rounded grows in the deepest ones, with these statistics.
    model = build_backbone(backbone, rngs=nnx.Rngs(0), dtype=jnp.float64)
    rng = np.random.default_rng(0)
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, BatchNorm):  # as after some training
            for value in (norm.weight, norm.running_var):
                value[...] = rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
            for value in (norm.bias, norm.running_mean):
                value[...] = rng.normal(0, 0.2, value.shape).astype(np.float32)
    images = rng.normal(0, 1, (2, 64, 64, 3))
    expected = jax.jit(as_function(model))(*split(model), images)[0]
    made = fixed(model)
    assert not any(isinstance(m, BatchNorm) for _, m in nnx.iter_modules(made))
    found = jax.jit(as_function(made))(*split(made), images)[0]
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)
    assert any(isinstance(m, BatchNorm) for _, m in nnx.iter_modules(model)) or (
        "vit" in backbone
    )
