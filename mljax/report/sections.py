"""The sections about all runs on the page: figures, training, labels, calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from mljax import config as configs
from mljax.images import sides_of
from mljax.report import charts, numbers, page
from mljax.report.gather import RunData

_FIGURES = ("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1")
_CURVES = (  # the title, what the axis says, TensorBoard's tag
    ("Loss in training", "loss", "train/loss"),
    ("Learning rate", "learning rate", "train/learning_rate"),
    ("Speed in training", "images/s", "train/images_per_second"),
)


def summary(run: RunData) -> Markup:
    """What the run is and how good it became."""
    model, found = run.config.model, dict(run.figures)
    if run.evaluation is not None and run.evaluation.kept_report is not None:
        found |= run.evaluation.kept_report
    best, evaluation = run.summary.get("best", {}), run.evaluation
    items = []
    for name in ("mAP", "CF1", "OF1"):
        if name in found:
            items.append((f"{100 * found[name]:.2f}", f"{name}, %"))
    if evaluation is not None:
        items.append(
            (f"{100 * evaluation.calibration.error:.2f}", "calibration error, %")
        )
        items.append((str(len(evaluation.p)), "validation images"))
    items.append((str(len(run.class_names)), "labels"))
    if "epoch" in best:
        items.append((f"{best['epoch']} / {run.config.epochs}", "best epoch / planned"))
    if run.costs is not None:
        items.append((f"{run.costs.parameters / 1e6:.2f} M", "parameters"))
    if run.curves.seconds:
        items.append((clock(run.curves.seconds), "at work"))
    height, width = sides_of(run.config.data)
    text = (
        f"{model.backbone} with the head {model.head}, loss {run.config.loss.name}, "
        f"{height} x {width} pixels."
    )
    if best:
        text += (
            f" The best weights ({best['weights']}) are of epoch {best['epoch']}, "
            f"chosen on {run.summary['chosen_on']}."
        )
    if evaluation is not None:
        text += f" All figures here are of the {len(evaluation.p)} images of val."
        if evaluation.kept_report is not None:
            text += " CF1 and OF1 are with the thresholds kept with the weights."
        if evaluation.unreadable:
            text += f" {evaluation.unreadable} more could not be read."
    return page.joined([page.cards(items), page.paragraph(text)])


def missing(run: RunData) -> Markup:
    """What this page lacks, and why; empty where it has all."""
    lines = list(run.missing)
    of_val = "val" in run.summary or run.summary.get("chosen_on") == "val"
    noted = run.noted.get("mAP") if of_val else None
    if run.evaluation and noted and abs(run.figures["mAP"] - noted) > 1e-3:
        lines.append(
            f"training noted mAP {100 * noted:.2f} for these weights: the data or the "
            "weights are no longer those of then"
        )
    if not lines:
        return Markup("")
    items = page.joined(Markup("<li>{}</li>").format(line) for line in lines)
    return Markup(
        '<div class="missing"><b>{}: missing or different</b><ul>{}</ul></div>'
    ).format(run.name, items)


def metrics(runs: Sequence[RunData]) -> Markup:
    """The table of figures, a column for each way to say labels: those above 0.5,
    above the kept thresholds, and the likeliest."""
    if not any("mAP" in run.figures for run in runs):
        return Markup("")
    columns = [page.Column("%", _FIGURES)]
    for run in runs:
        name = "" if len(runs) == 1 else f"{run.name}, "
        top3 = {key: run.figures.get(f"{key}_top3", np.nan) for key in _FIGURES}
        rules = [("p > 0.5", run.figures), ("the 3 likeliest", top3)]
        if run.evaluation is not None and run.evaluation.kept_report is not None:
            rules.insert(1, ("kept thresholds", run.evaluation.kept_report))
        for rule, found in rules:
            # The mAP needs no rule: it stands once.
            values = [100 * found.get(key, np.nan) for key in _FIGURES]
            columns.append(page.numbers(f"{name}{rule}", values, 2))
    text = (
        "mAP: mean over the labels of the average precision. P, R, F1: precision, "
        "recall and their harmonic mean, C as means over labels, O of all together."
    )
    return page.joined([page.note(text), page.table(columns)])


def differences(runs: Sequence[RunData]) -> Markup:
    """Settings that are not the same in all runs."""
    flat = [configs.flatten(run.config) for run in runs]
    keys = [key for key in flat[0] if len({repr(f[key]) for f in flat}) > 1]
    if not keys:
        return page.paragraph("The settings of these runs are the same.")
    columns = [page.Column("setting", keys, css="value")]
    for run, values in zip(runs, flat, strict=True):
        cells = [shown(values[key]) for key in keys]
        columns.append(page.Column(run.name, cells, css="value"))
    return page.table(columns)


def training(runs: Sequence[RunData]) -> Markup:
    """Curves over the steps, of all runs in one chart each."""
    made = [_quality(runs)]
    for title, y, tag in _CURVES:
        series = []
        for i, run in enumerate(runs):
            if tag not in run.curves.values:
                continue
            steps, values = run.curves.values[tag]
            if tag != "train/learning_rate":
                values = charts.smoothed(values)
            series.append((run.name, steps, values, "-", i))
        if not series and tag == "train/loss":
            series = _loss_of_epochs(runs)
        if series:
            made.append(charts.lines(title, series, x="step", y=y))
    return page.charts(made)


def _loss_of_epochs(runs: Sequence[RunData]) -> list[Any]:
    series = []
    for i, run in enumerate(runs):
        rows = [row for row in run.history if row["loss"] is not None]
        if rows:
            steps, values = _column(rows, "step"), _column(rows, "loss")
            series.append((run.name, steps, values, "-", i))
    return series


def _quality(runs: Sequence[RunData]) -> Markup:
    """mAP at each evaluation; of a single run also the raw and the averaged weights."""
    series = []
    for i, run in enumerate(runs):
        if not run.history:
            continue
        epochs = _column(run.history, "epoch")
        if len(runs) > 1:
            values = 100 * _column(run.history, "mAP")
            series.append((run.name, epochs, values, "-", i))
            continue
        kinds = [("mAP_raw", "raw weights"), ("mAP_ema", "ema weights")]
        kinds += [("CF1", "CF1"), ("OF1", "OF1")]
        for place, (key, name) in enumerate(kinds):
            values = 100 * _column(run.history, key)
            if not np.isnan(values).all():
                style = "-" if key.startswith("mAP") else ":"
                name = f"mAP, {name}" if key.startswith("mAP") else name
                series.append((name, epochs, values, style, place))
    if not series:
        return Markup("")
    title = "Quality on the evaluated images"
    return charts.lines(title, series, x="epoch", y="%")


def _column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    values = [row.get(key) for row in rows]
    return np.array([np.nan if v is None else v for v in values], float)


def labels(runs: Sequence[RunData]) -> Markup:
    """AP of each label with its positives; of a single run with its curve."""
    names = sorted(
        {name for run in runs for name in run.class_names}, key=lambda n: (n.lower(), n)
    )
    if not names:
        return Markup("")
    columns = [page.Column("label", names), *_supports(runs, names)]
    each = [
        [100 * run.average_precisions.get(n, np.nan) for n in names] for run in runs
    ]
    single = len(runs) == 1
    for run, values in zip(runs, each, strict=True):
        title = "AP, %" if single else f"AP, {run.name}"
        columns.append(page.numbers(title, values, 1, bar=single))
    if len(runs) == 2:
        apart = np.subtract(each[1], each[0])
        columns.append(page.numbers("second - first", apart, 1))
    if single and runs[0].evaluation is not None:
        curves = _sparklines(runs[0])
        cells = [curves[name] for name in names]
        columns.append(page.Column("precision over recall", cells))
    text = "AP: the mean precision at the images that have the label."
    if empty := int(np.isnan(each[0]).sum()) if single else 0:
        text += f" Labels without such an image ({empty}) are left out of the mAP."
    return page.joined([page.note(text), page.table(columns, sortable=True)])


def _supports(runs: Sequence[RunData], names: Sequence[str]) -> list[page.Column]:
    """The images of each label: one column if the runs have the same, else each."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.evaluation is not None:
            counts = (run.evaluation.labels == 1).sum(0).tolist()
            by_name = dict(zip(run.class_names, counts, strict=True))
            found[run.name] = [by_name.get(name, np.nan) for name in names]
    if len({tuple(counts) for counts in found.values()}) == 1:
        return [page.numbers("images", next(iter(found.values())), 0)]
    return [page.numbers(f"images, {run}", c, 0) for run, c in found.items()]


def _sparklines(run: RunData) -> dict[str, Markup | None]:
    assert run.evaluation is not None
    made: dict[str, Markup | None] = {}
    for c, name in enumerate(run.class_names):
        points = numbers.curve(run.evaluation.p[:, c], run.evaluation.labels[:, c])
        recalls = numbers.GRID[::4]
        made[name] = points and charts.sparkline(
            recalls, points.at(recalls), f"{name}: precision over recall"
        )
    return made


def precision_and_calibration(runs: Sequence[RunData]) -> Markup:
    """Two charts of all entries, and what they say."""
    evaluated = [(i, run) for i, run in enumerate(runs) if run.evaluation is not None]
    if not evaluated:
        return Markup("")
    series = []
    for i, run in evaluated:
        assert run.evaluation is not None
        found = numbers.pooled_curve(run.evaluation.p, run.evaluation.labels, 300)
        if found is not None:
            pooled = 100 * found.recall, 100 * found.precision
            series.append((run.name, *pooled, charts.SERIES[i % len(charts.SERIES)]))

    def precision(axes: Any) -> None:
        if len(evaluated) == 1:
            spread = _spread(evaluated[0][1])
            if spread is not None:
                low, middle, high = 100 * spread
                grid, colour = 100 * numbers.GRID, charts.SERIES[1]
                axes.fill_between(
                    grid, low, high, color=colour, alpha=0.18, linewidth=0
                )
                axes.plot(grid, middle, "--", color=colour, label="the middle label")
        for name, xs, ys, colour in series:
            name = name if len(evaluated) > 1 else "all labels pooled"
            axes.plot(xs, ys, color=colour, label=charts.shortened(name))
        if len(evaluated) == 1:
            for mark, label, found in _operating_points(evaluated[0][1]):
                place = 100 * found["OR"], 100 * found["OP"]
                axes.plot(*place, mark, color=charts.INK, markersize=5, label=label)
        axes.set(xlim=(0, 101), ylim=(0, 101))
        axes.legend(loc="lower left")

    def reliability(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], "--", color=charts.FAINT)
        for i, run in evaluated:
            assert run.evaluation is not None
            name = f"{charts.shortened(run.name)}, " if len(evaluated) > 1 else ""
            found = run.evaluation.calibration
            curves = [(name, found, "o-", i)]
            if run.kept is not None and run.kept.calibration is not None:
                curves = [(f"{name}calibrated, ", found, "o-", i)]
                if len(evaluated) == 1:
                    evaluation = run.evaluation
                    before = numbers.calibration(
                        evaluation.trained_p, evaluation.labels
                    )
                    curves.append(("as trained, ", before, "s:", i + 1))
            for label, each, style, colour in curves:
                axes.plot(
                    100 * each.said,
                    100 * each.true,
                    style,
                    markersize=4,
                    color=charts.SERIES[colour % len(charts.SERIES)],
                    label=f"{label}ECE {100 * each.error:.2f} %",
                )
        axes.set(xlim=(0, 101), ylim=(0, 101))
        axes.legend(loc="upper left")

    title = "Precision and recall"
    made = [
        charts.chart(title, precision, x="recall, %", y="precision, %"),
        charts.chart(
            "Calibration", reliability, x="probability said, %", y="share right, %"
        ),
    ]
    text = (
        "Calibration: the probabilities of all images and labels, in "
        f"{numbers.BINS} bins; on the dashed line they say how often they are right. "
        "ECE is the mean distance from it, over all of them; most are near 0."
    )
    if len(evaluated) == 1:
        text = f"Shaded: the middle 80 % of the labels. {text}"
    return page.joined([page.charts(made), page.note(text)])


def _operating_points(run: RunData) -> list[tuple[str, str, dict[str, Any]]]:
    """(marker, name, figures): what is said at 0.5, and at the kept thresholds."""
    assert run.evaluation is not None
    points = [("x", "p > 0.5", run.evaluation.report)]
    if run.evaluation.kept_report is not None:
        points.append(("D", "kept thresholds", run.evaluation.kept_report))
    return points


def _spread(run: RunData) -> np.ndarray | None:
    """10th, 50th and 90th percentile of the labels' precision at each recall."""
    assert run.evaluation is not None
    p, labels = run.evaluation.p, run.evaluation.labels
    each = (numbers.curve(p[:, c], labels[:, c]) for c in range(p.shape[1]))
    at = [points.at(numbers.GRID) for points in each if points is not None]
    return np.percentile(at, (10, 50, 90), axis=0) if len(at) > 4 else None


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
