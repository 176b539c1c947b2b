"""What a run has found stays there, whatever is done to its directory or its data."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from data_trees import tree
from test_preemption import settings, stop_at  # noqa: F401

from mljax import config, evaluate_workdir, train
from mljax.checkpoint import Checkpoints
from mljax.errors import Stopped, UserError


@pytest.fixture
def files(settings, tmp_path):  # noqa: F811
    """`settings` on 24 photos of files, 6 of them held out, and 5 of val."""
    data = tree(tmp_path / "data", num_train=24)
    settings.data.update(name="annotations", root=data.root, holdout=0.25)
    settings.data.update(num_train=0, num_val=0)
    settings.batch_size, settings.epochs = 8, 1
    return settings


def stop(settings, monkeypatch, run, at):  # noqa: F811
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, at, signal.SIGTERM)
        train.train(settings, str(run))


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


@pytest.mark.parametrize("epochs", [1, 2])
def test_results_without_checkpoints_are_kept(settings, tmp_path, epochs):  # noqa: F811
    run = tmp_path / "run"
    settings.epochs = epochs
    train.train(settings, str(run))
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with pytest.raises(UserError, match="run: holds the results of a run and no check"):
        train.train(settings, str(run))
    after = contents(run)
    assert {name: after[name] for name in before} == before
    # Evaluated it can still be, on any number of devices.
    settings.batch_size = 84
    evaluate_workdir.evaluate_workdir(settings, str(run))


def test_a_finished_run_is_not_evaluated_again(
    settings,  # noqa: F811
    monkeypatch,
    tmp_path,
    capsys,
):
    """Stopped at its last step, whose evaluation the next start has done."""
    run = tmp_path / "run"
    settings.epochs = 1
    stop(settings, monkeypatch, run, at=4)
    train.train(settings, str(run))
    assert "epoch 1: mAP" in capsys.readouterr().out
    (run / "best" / "4" / "thresholds.json").write_text("{}")
    before = contents(run / "best")
    train.train(settings, str(run))
    assert "epoch 1: mAP" not in capsys.readouterr().out
    assert contents(run / "best") == before


def test_without_its_gpu_a_run_goes_on_only_if_asked_to(
    settings,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    run = tmp_path / "run"
    settings.epochs = 1
    stop(settings, monkeypatch, run, at=2)
    saved = Checkpoints(run / "checkpoints")
    assert saved.about(2)["platform"] == "cpu"
    saved.amend(2, progress=saved.about(2)["progress"], platform="gpu")
    before = contents(run)
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match=r"on a GPU so far.*\[cuda\].*=cpu before"):
            train.train(settings, str(run))
        assert contents(run) == before
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            train.train(settings, str(run))
        saved = Checkpoints(run / "checkpoints")
        saved.amend(4, progress=saved.about(4)["progress"], platform="gpu")
        train.train(settings, str(run))  # nothing is left to compute
    finally:
        jax.config.update("jax_platforms", "cpu")


def test_val_without_labels_is_not_measured(files, tmp_path, capsys):
    path = tmp_path / "data" / "val.json"
    val = json.loads(path.read_text())
    val["images"] = [[name, []] for name, *_ in val["images"]]
    path.write_text(json.dumps(val))
    summary = train.train(files, str(tmp_path / "run"))
    assert "val" not in summary and summary["chosen_on"] == "25% held out of train"
    said = capsys.readouterr().out
    assert "val:     not measured, no image that can be read has a label" in said
    assert f"{100 * summary['best']['mAP']:.2f}" in said and "predictions: " in said


def test_another_label_graph_is_refused(settings, monkeypatch, tmp_path):  # noqa: F811
    matrix, vectors = np.full((14, 14), 0.5), np.ones((14, 8))
    for name, array in (("matrix", matrix), ("vectors", vectors)):
        np.save(tmp_path / f"{name}.npy", array)
    settings.model.head = "gcn"
    settings.model.graph.adjacency = str(tmp_path / "matrix.npy")
    settings.model.graph.embeddings = str(tmp_path / "vectors.npy")
    config.validate(settings)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 2, signal.SIGTERM)
        train.train(settings, str(tmp_path / "run"))
    before = contents(tmp_path / "run")
    for name, array, what in (
        ("matrix", matrix, "label graph"),
        ("vectors", vectors, "label embeddings"),
    ):
        np.save(tmp_path / f"{name}.npy", array / 2)
        with pytest.raises(UserError, match=f"the {what} .*changed since"):
            train.train(settings, str(tmp_path / "run"))
        np.save(tmp_path / f"{name}.npy", array)
    after = contents(tmp_path / "run")
    assert after == {name: after[name] for name in before} == before


@pytest.mark.parametrize("half_life", [0.05, 1e30])
def test_an_average_of_nothing_is_refused(settings, tmp_path, half_life):  # noqa: F811
    settings.ema.half_life = half_life
    with pytest.raises(
        UserError, match=r"ema.half_life = .*: is a decay of .* for a step of 16"
    ):
        train.train(settings, str(tmp_path / "run"))


@pytest.mark.parametrize("weight", ["1" + 400 * "0", "1e39", "true", "-1", "NaN"])
def test_class_weights_are_finite_numbers(files, tmp_path, weight):
    names = json.loads((tmp_path / "data" / "val.json").read_text())["classes"]
    text = ", ".join(f'"{name}": {weight}' for name in names)
    (tmp_path / "weights.json").write_text(f"{{{text}}}")
    files.loss.class_weights = str(tmp_path / "weights.json")
    with pytest.raises(UserError, match="weights.json: weights must be numbers"):
        train.train(files, str(tmp_path / "run"))
