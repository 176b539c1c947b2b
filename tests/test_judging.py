"""What a run makes of its evaluations: when it ends, and which weights it keeps."""

import json
import signal

import jax
import numpy as np
import pytest
from runs import same_results
from test_preemption import settings, stop_at  # noqa: F401 (fixture)

from mljax import checkpoint, config, evaluate, results, train
from mljax.errors import Stopped, UserError
from mljax.progress import Progress, warmup_epochs


def judged_by(monkeypatch, mean_aps, weights="raw"):
    """Evaluations give these values of mAP, one after the other."""
    plain, rest = results.row, iter(mean_aps)

    def row(*arguments):
        found, per_class = plain(*arguments)
        return {**found, "mAP": next(rest), "weights": weights}, per_class

    monkeypatch.setattr(results, "row", row)


def rows(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "mean_aps", "steps"),
    [
        ({}, [0.5, 0.3, 0.3], [4, 8, 12]),  # two that do not count are enough
        ({"train.patience": 1}, [0.5, 0.3], [4, 8]),
        ({"train.patience": 1, "train.warmup_epochs": 2}, [0.5, 0.3, 0.3], [4, 8, 12]),
        ({"train.patience": 1, "train.eval_every": 2}, [0.5, 0.3], [8, 16]),
        ({"train.patience": 0}, [0.5, 0.3, 0.3, 0.3, 0.3], [4, 8, 12, 16, 20]),
        ({"train.patience": 0, "train.eval_every": 2}, [0.5] * 3, [8, 16, 20]),
    ],
)
def test_a_run_without_progress_ends(
    settings,  # noqa: F811
    monkeypatch,
    tmp_path,
    capsys,
    changes,
    mean_aps,
    steps,
):
    settings.epochs, settings.train.patience = 5, 2  # of four steps
    settings.train.warmup_epochs = 0
    settings.update_from_flattened_dict(changes)
    judged_by(monkeypatch, mean_aps)
    train.train(settings, str(tmp_path / "run"))
    assert [row["step"] for row in rows(tmp_path / "run")] == steps
    stopped = "early stopping" in capsys.readouterr().out
    assert stopped == bool(settings.train.patience)
    # The same command has nothing to add.
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    train.train(settings, str(tmp_path / "run"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_with_more_patience_a_run_that_ended_goes_on(settings, monkeypatch, tmp_path):  # noqa: F811
    settings.epochs = 5  # of four steps; the learning rate rises in the first one
    folder = tmp_path / "run"
    for patience, ends in ((1, 8), (1, 8), (2, 12), (0, 20)):
        settings.train.patience = patience
        # Every start goes on with the next one.
        done = len(rows(folder)) if folder.exists() else 0
        with monkeypatch.context() as patch:
            judged_by(patch, [0.5, 0.3, 0.3, 0.3, 0.3][done:])
            train.train(settings, str(folder))
        assert [row["step"] for row in rows(folder)] == [*range(4, ends + 1, 4)]
    assert json.loads((folder / "metrics.json").read_text())["best"]["step"] == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 12),
        ({"train.warmup_epochs": 0}, 0),
        ({"train.warmup_epochs": 3}, 3),
        ({"optim.schedule": "cosine", "optim.pct_start": 0.11}, 7),
        ({"optim.schedule": "constant"}, 0),
        ({"optim.freeze": "backbone", "optim.freeze_epochs": 14}, 14),
    ],
)
def test_early_stopping_waits_while_the_learning_rate_rises(changes, expected):
    coco = config.load("configs/coco.py")
    coco.update_from_flattened_dict(changes)
    assert warmup_epochs(coco) == expected
    found, waited = Progress(), []
    for epoch in range(1, 20):
        if found.decide(0.4 if epoch == 1 else 0.3, epoch, coco).stop:
            break
        waited.append(found.stopping.wait)
    assert len(waited) == max(1, expected) + 4 and found.stopped
    assert waited[max(1, expected) :] == [1, 2, 3, 4]


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_weights_that_won_are_kept(settings, monkeypatch, tmp_path, weights):  # noqa: F811
    settings.epochs, settings.train.patience = 2, 0
    judged_by(monkeypatch, [0.5, 0.4], weights)
    seen = []
    plain = evaluate.run

    def run(step, variants, *rest):
        seen.append(jax.tree.map(np.asarray, variants))
        return plain(step, variants, *rest)

    monkeypatch.setattr(evaluate, "run", run)
    train.train(settings, str(tmp_path / "run"))
    found, about = checkpoint.load_variables(checkpoint.find_best(tmp_path / "run"))
    assert about["best"]["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, found, seen[0][weights])
    other = {"raw": "ema", "ema": "raw"}[weights]
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, found, seen[0][other])


def die(*_, **__):
    raise KeyboardInterrupt


def killed(monkeypatch, settings, folder, where, name, after):  # noqa: F811
    """A run that dies at the call of `where.name` that comes `after` others."""
    plain, calls = getattr(where, name), []

    def counted(*arguments, **options):
        calls.append(arguments)
        return (die if len(calls) > after else plain)(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, name, counted)
        train.train(settings, str(folder))


def test_a_death_in_an_evaluation_costs_no_steps(
    settings,  # noqa: F811
    monkeypatch,
    tmp_path,
    capsys,
):
    settings.epochs, settings.train.patience = 2, 0
    train.train(settings, str(tmp_path / "whole"))
    for name, where, after in (
        ("row", results, 1),  # nothing is kept of it
        ("write_history", train.workdir, 2),  # they are kept; 1 is the start's
        ("amend", checkpoint.Checkpoints, 1),  # all is written but that it was done
    ):
        run = tmp_path / name
        killed(monkeypatch, settings, run, where, name, after)
        capsys.readouterr()
        train.train(settings, str(run))
        assert "resumed at step 8" in capsys.readouterr().out
        same_results(tmp_path / "whole", run)


def test_the_best_of_an_evaluation_that_counts_anew(settings, monkeypatch, tmp_path):  # noqa: F811
    """On another machine, or with other pictures that cannot be read."""
    settings.epochs, settings.train.patience = 2, 0
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        judged_by(patch, [0.5, 0.9])
        killed(patch, settings, run, checkpoint.Checkpoints, "amend", 1)
    assert checkpoint.find_best(run).name == "8"
    judged_by(monkeypatch, [0.3])
    train.train(settings, str(run))
    assert checkpoint.find_best(run).name == "4"
    assert [row["mAP"] for row in rows(run)] == [0.5, 0.3]


def test_a_run_that_stopped_early_is_not_evaluated_again(
    settings,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    settings.train.patience, settings.train.warmup_epochs = 1, 0
    run = str(tmp_path / "run")
    judged_by(monkeypatch, [0.5, 0.3])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 8, signal.SIGTERM)  # at the end of an epoch
        train.train(settings, run)
    train.train(settings, run)
    assert [row["step"] for row in rows(tmp_path / "run")] == [4, 8]
    monkeypatch.setattr(results, "row", die)
    train.train(settings, run)


def test_a_run_that_diverged_keeps_its_curves(settings, tmp_path):  # noqa: F811
    settings.optim.lr, settings.optim.schedule = 1e30, "constant"
    settings.sam.rho, settings.train.max_bad_steps = 0.0, 2
    with pytest.raises(UserError, match="steps in a row had a loss or gradient that"):
        train.train(settings, str(tmp_path))
    assert (tmp_path / "config.json").exists()
    assert list((tmp_path / "tensorboard").glob("events*"))
