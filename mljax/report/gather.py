"""What a work directory holds, and its best weights on the validation images."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np
from ml_collections import ConfigDict

from mljax import (
    checkpoint,
    decision,
    evaluate,
    heatmaps,
    metrics,
    results,
    workdir,
)
from mljax import config as configs
from mljax.data import DATASETS
from mljax.data.source import Source
from mljax.errors import UserError
from mljax.report import numbers, speed
from mljax.report.curves import Curves, read_curves
from mljax.run import check_names, make_run

# What files that are gone, damaged or of something else lead to.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error)


class Evaluation(NamedTuple):
    """The best weights on the validation images that could be read.

    Attributes:
        p: probabilities as `mljax.predict` gives them (calibrated if a calibration is
            kept with the weights), float32 [num_images, num_classes].
        trained_p: the same before calibration.
        thresholds: float32 [num_classes]; a label is said above its own. Those kept
            with the weights, else 0.5.
        labels: int8 [num_images, num_classes] in {1, 0, -1}.
        places: of the images in `source`.
        unreadable: how many more there are.
        report: of `evaluate.report`: of `trained_p`, at 0.5.
        kept_report: CP, CR, CF1, ... of `p` at `thresholds`; None: none are kept.
        calibration: of `p`.
    """

    source: Source
    p: np.ndarray
    trained_p: np.ndarray
    thresholds: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    unreadable: int
    report: dict[str, Any]
    kept_report: dict[str, float] | None
    calibration: numbers.Calibration


class RunData(NamedTuple):
    """Everything about one run that the page shows; what is None is in `missing`.

    Attributes:
        history: the rows of metrics.jsonl.
        summary: metrics.json, or {} before the first evaluation.
        about: the description of the best checkpoint, or {}.
        kept: thresholds and calibration that are kept with it, if any.
        graph: the arrays of label_graph.npz.
        missing: a line for each thing that could not be had, with the reason.
    """

    name: str
    folder: Path
    config: ConfigDict
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    curves: Curves
    about: dict[str, Any]
    kept: decision.Decision | None
    explainer: heatmaps.Explainer | None
    costs: speed.Costs | None
    evaluation: Evaluation | None
    graph: dict[str, np.ndarray] | None
    missing: list[str]

    @property
    def class_names(self) -> list[str]:
        return list(self.about.get("class_names") or self.summary.get("per_class", {}))

    @property
    def noted(self) -> dict[str, Any]:
        """What training wrote about the best weights, on val where it could."""
        return self.summary.get("val") or self.summary.get("best") or {}

    @property
    def figures(self) -> dict[str, Any]:
        """mAP, CF1, ... of the evaluation, else those that training noted."""
        return self.noted if self.evaluation is None else self.evaluation.report

    @property
    def average_precisions(self) -> dict[str, float]:
        """By label; NaN where no image has it."""
        found = self.summary.get("val", self.summary).get("per_class", {})
        if self.evaluation is not None:
            each = self.evaluation.report["per_class"]
            found = dict(zip(self.class_names, each, strict=True))
        return {name: np.nan if ap is None else ap for name, ap in found.items()}


def gather(
    name: str, folder: Path, root: str | None, say: Callable[[str], None]
) -> RunData:
    """Reads the work directory and runs its best weights.

    Args:
        name: of the run on the page.
        folder: absolute.
        root: where the data is now, or None: where the run had it.
        say: is told what takes time.

    Raises:
        UserError: the folder holds no run.
    """
    config, missing = workdir.read_config(folder), []

    def attempt(what: str, job: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return job()
        except _DAMAGED as error:
            reason = " ".join(str(error).split())
            missing.append(f"{what}: {reason}")
            return otherwise

    history = attempt(
        "the evaluations of training", lambda: workdir.read_history(folder, 2**62), []
    )
    summary = attempt("the summary of training", lambda: _summary(folder), {})
    curves = attempt(
        "loss, learning rate and speed of each step",
        lambda: read_curves(folder / "tensorboard"),
        Curves({}, None),
    )
    graph = None
    if (folder / "label_graph.npz").exists():
        graph = attempt("the label graph", lambda: _graph(folder), None)
    about: dict[str, Any] = {}
    kept, explainer, costs, evaluation = None, None, None, None
    loaded = attempt("the best weights", lambda: _model(folder), None)
    if loaded is None:
        missing.append("all that needs the best weights and the validation images")
    else:
        model, about, step = loaded
        names = about["class_names"]
        kept = attempt("the thresholds", lambda: _kept(step, names), None)
        explainer = heatmaps.Explainer(
            model, about, kept or decision.default(len(names))
        )
        say(f"{name}: measuring the speed")
        costs = attempt(
            "the speed", lambda: speed.measure(model, explainer.config), None
        )
        say(f"{name}: evaluating on the validation images")
        evaluation = attempt(
            "all that needs the validation images",
            lambda: _evaluate(folder, step, config, about, kept, root),
            None,
        )
    return RunData(
        name=name,
        folder=folder,
        config=config,
        history=history,
        summary=summary,
        curves=curves,
        about=about,
        kept=kept,
        explainer=explainer,
        costs=costs,
        evaluation=evaluation,
        graph=graph,
        missing=missing,
    )


def _model(folder: Path) -> tuple[Any, dict[str, Any], Path]:
    from mljax.models import folded, pretrained

    step = checkpoint.find_best(folder)
    model, about = pretrained.restore(step)
    return folded(model), about, step


def _kept(step: Path, class_names: list[str]) -> decision.Decision | None:
    if not (step / decision.FILE).exists():
        return None
    return decision.load(step, class_names)


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / workdir.SUMMARY
    if not file.exists():
        raise UserError(f"there is no {file.name}: no evaluation was reached")
    return json.loads(file.read_text(encoding="utf-8"))


def _graph(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "label_graph.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in ("class_names", "cooccurrence", "tau")}


def _evaluate(
    folder: Path,
    step: Path,
    config: ConfigDict,
    about: Mapping[str, Any],
    kept: decision.Decision | None,
    root: str | None,
) -> Evaluation:
    config = config.copy_and_resolve_references()
    if root is not None:
        config.data.root = root
    config.data.on_error = "skip"  # the page says how many
    configs.validate(config, chosen=())
    configs.fit_devices(config, jax.device_count())
    check_names(config)
    try:
        val = DATASETS[config.data.name](config.data, config.seed).val
    except UserError as error:
        raise UserError(f"{error} (here: --root FOLDER)") from error
    results.need_positives(val, "val")
    workdir.check_same_classes(str(folder), about, val.class_names)
    run = make_run(config, val.class_names)
    run, variables, _ = results.best_weights(run, step)
    scores = run.scores({"best": variables}, val)["best"]
    read = ~np.isin(scores.places, scores.unreadable)
    if not read.any():
        raise UserError("none of the validation images can be read")
    readable = evaluate.Scores(
        scores.outputs[read], scores.labels[read], scores.places[read], np.zeros(0, int)
    )
    trained_p = np.asarray(run.probabilities(readable.outputs))
    p, kept_report = trained_p, None
    used = kept or decision.default(len(val.class_names))
    if kept is not None:
        p = np.asarray(
            decision.probabilities(readable.outputs, config.loss, kept.calibration)
        )
    # Evaluation counts what is not a number as the lowest, and says so.
    p, trained_p = np.nan_to_num(p), np.nan_to_num(trained_p)
    if kept is not None:
        kept_report = metrics.classification_report(p, readable.labels, used.thresholds)
    return Evaluation(
        source=val,
        p=p,
        trained_p=trained_p,
        thresholds=used.thresholds,
        labels=readable.labels,
        places=readable.places,
        unreadable=len(scores.unreadable),
        report=evaluate.report(readable, run.probabilities),
        kept_report=kept_report,
        calibration=numbers.calibration(p, readable.labels),
    )
