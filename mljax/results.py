"""From scores to what a person reads: rows, metrics.json, the table, the picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mljax import checkpoint, evaluate, pictures, sharding, tables, workdir
from mljax.data.source import Source, Sources
from mljax.early_stopping import better_weights
from mljax.errors import UserError
from mljax.models.functional import NETWORKS
from mljax.progress import Progress
from mljax.run import Run, for_use
from mljax.step import TrainState
from mljax.terminal import Terminal

_FIGURES = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def choose_judge(sources: Sources, config: ConfigDict) -> tuple[Source, str]:
    """The images on which the best epoch is chosen, and what to call them.

    Raises:
        UserError: no class has a positive there, so that no mAP exists.
    """
    held = sources.holdout
    if held is None:
        judge, name = sources.val, "val"
    else:
        judge, name = held, f"{config.data.holdout:.0%} held out of train"
    need_positives(judge, name)
    return judge, name


def need_positives(source: Source, name: str) -> None:
    """Raises UserError if no class has a positive, so that there is no mAP."""
    if not (source.labels == 1).any():
        raise UserError(f"{name}: no image has a label, so there is no mAP to compute")


def variants(state: TrainState, is_pair: bool) -> dict[str, dict[str, Any]]:
    """The weights to evaluate: "raw", and "ema" where there is one.

    Of a pair those of each network: "raw one", "raw two" and so on.
    """
    found = {"raw": {"params": state.params, "batch_stats": state.batch_stats}}
    if state.ema_params is not None:
        ema = {"params": state.ema_params, "batch_stats": state.ema_batch_stats}
        found["ema"] = ema
    if not is_pair:
        return found
    return {
        f"{weights} {network}": {kind: tree[network] for kind, tree in both.items()}
        for weights, both in found.items()
        for network in NETWORKS
    }


def variant(row: Mapping[str, Any]) -> str:
    """Which of the `variants` a row is about."""
    return f"{row['weights']} {row['network']}" if "network" in row else row["weights"]


def row(
    step: int,
    epoch: int,
    progress: Progress,
    scores: Mapping[str, evaluate.Scores],
    run: Run,
) -> tuple[dict[str, Any], list[float | None]]:
    """One line of metrics.jsonl, and the AP of every class (None: no positive).

    It is about the weights that count, of a pair those of its better network.
    """
    reports = {k: evaluate.report(s, run.probabilities) for k, s in scores.items()}
    networks: dict[str, dict[str, Any]] = {}
    for network in NETWORKS if run.is_pair else ("",):
        end = f" {network}" if network else ""
        raw = reports[f"raw{end}"]["mAP"]
        ema = reports[f"ema{end}"]["mAP"] if f"ema{end}" in reports else None
        _, weights = better_weights(raw, ema)
        networks[network] = {
            "mAP_raw": raw,
            "mAP_ema": ema,
            "weights": weights,
            **reports[weights + end],
        }
    # A tie goes to the first.
    better = max(networks, key=lambda network: networks[network]["mAP"])
    chosen = networks[better]
    per_class = chosen.pop("per_class")
    nan_images = max(report.get("nan_images", 0) for report in reports.values())
    line = {
        "step": step,
        "epoch": epoch,
        "loss": progress.end_of_epoch_loss(),
        "skipped_steps": progress.skipped,
        **chosen,
        **({"nan_images": nan_images} if nan_images else {}),
    }
    if run.is_pair:
        each = {f"mAP_{name}": found["mAP"] for name, found in networks.items()}
        line |= {"network": better, **each}
    return line, per_class


def write_summary(
    folder: Path,
    progress: Progress,
    history: list[dict[str, Any]],
    names: list[str],
    chosen_on: str,
    **more: Any,
) -> dict[str, Any]:
    """metrics.json: the best and the last evaluation, AP by class of the best."""
    assert progress.best is not None
    best = dict(progress.best)
    per_class = dict(zip(names, best.pop("per_class"), strict=True))
    summary = {
        "best": best,
        "last": history[-1],
        "per_class": per_class,
        "classes_without_positives": [k for k, v in per_class.items() if v is None],
        "chosen_on": chosen_on,
        **more,
    }
    workdir.write_summary(folder, summary)
    return summary


def best_weights(run: Run, path: Path) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """The variables of a saved step, or the best of a work directory, placed on the
    mesh, with the run that uses them (`for_use`), and their description."""
    variables, about = checkpoint.load_variables(checkpoint.find_best(path))
    run, variables = for_use(run, variables)
    placed = sharding.place(variables, sharding.state_sharding(variables, run.mesh))
    return run, placed, about


def table(
    names: list[str],
    per_class: list[float | None],
    source: Source,
    figures: Mapping[str, float],
    file: str = workdir.SUMMARY,
) -> str:
    """The result as text: AP by class with its positives, then the means.

    file: has those that are not shown.
    """
    positives = (source.labels == 1).sum(0)
    order = sorted(range(len(names)), key=lambda i: -(per_class[i] or 0.0))
    lines = []
    for i in order:
        ap = per_class[i]
        text = "none" if ap is None else f"{100 * ap:.2f}"
        lines.append(f"{names[i]:<24} {positives[i]:>9} {text:>7}")
    head = f"{'class':<24} {'positives':>9} {'AP':>7}"
    shown = [head, *tables.ends(lines, file)]
    empty = sum(ap is None for ap in per_class)
    if empty:
        shown.append(f"({empty} without a positive are left out of the mean)")
    shown.append(f"{'mAP':<24} {'':>9} {100 * figures['mAP']:>7.2f}")
    for end, rule in ("", "p > 0.5"), ("_top3", "the 3 most probable"):
        parts = [f"{k} {100 * figures[k + end]:5.2f}" for k in _FIGURES]
        shown.append(f"{'  '.join(parts)}  ({rule})")
    return "\n".join(shown)


def picture(run: Run, folder: Path, source: Source, variables: dict) -> Path:
    """predictions.png: images spread over `source`, true and predicted labels."""
    count = min(len(source), pictures.SHEET)
    places = np.linspace(0, len(source) - 1, count).astype(int)
    few = source.take(places)
    scores = run.scores({"best": variables}, few)["best"]
    file = folder / "predictions.png"
    if jax.process_index():
        return file
    images = [
        pictures.shrink(few.read(i).numpy())
        for i in scores.places
        if i not in scores.unreadable
    ]
    keep = [k for k, i in enumerate(scores.places) if i not in scores.unreadable]
    pictures.sheet(
        file,
        images,
        np.asarray(run.probabilities(scores.outputs))[keep],
        scores.labels[keep],
        run.class_names,
    )
    return file


def finish(
    run: Run,
    folder: Path,
    sources: Sources,
    progress: Progress,
    history: list[dict[str, Any]],
    chosen_on: str,
    terminal: Terminal,
) -> dict[str, Any]:
    """The table and the picture of the best weights; with a held-out part of train,
    their metrics on val, which had no say in the choice, if val has labels."""
    best = progress.best or {}
    run, variables, _ = best_weights(run, folder / "best" / str(best["step"]))
    more = {}
    val = shown = sources.val
    figures, per_class = best, best["per_class"]
    if sources.holdout is not None:
        scores = run.scores({"best": variables}, val)
        progress.unreadable.update(evaluate.unreadable(scores, val.names))
        terminal.unreadable(progress)
        workdir.write_unreadable(folder, progress.unreadable)
        try:
            report = evaluate.report(scores["best"], run.probabilities)
        except UserError as error:  # a test set whose labels nobody has
            shown = sources.holdout
            terminal.say(f"val:     not measured, {error}")
        else:
            figures, per_class = report, report.pop("per_class")
            more["val"] = {
                **report,
                "per_class": dict(zip(run.class_names, per_class, strict=True)),
            }
    summary = write_summary(
        folder, progress, history, run.class_names, chosen_on, **more
    )
    terminal.say("")
    terminal.say(table(run.class_names, per_class, shown, figures))
    terminal.say(
        f"best: mAP {100 * best['mAP']:.2f} of the {best['weights']} weights"
        f"{' of network ' + best['network'] if run.is_pair else ''} at epoch "
        f"{best['epoch']}, chosen on {chosen_on}"
    )
    if figure := run.config.published_mAP:
        known = "no figure is known"
        if figure > 0:
            known = f"mAP {figure:.2f} (on its data, with its settings)"
        terminal.say(f"published for this recipe: {known}")
    file = picture(run, folder, val, variables)
    terminal.say(f"predictions: {file}\nmetrics:     {folder / workdir.SUMMARY}")
    return summary
