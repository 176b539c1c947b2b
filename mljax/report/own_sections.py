"""The sections about one run: thresholds, confusions, graph, images, costs, config."""

import json

import numpy as np
from markupsafe import Markup

from mljax import config as configs
from mljax import (
    heatmap_pictures,
    label_graph_data,
    label_graph_picture,
    operating_points,
    pictures,
    versions,
)
from mljax.decision import DEFAULT
from mljax.report import charts, numbers, page, speed
from mljax.report.gather import Evaluation, RunData
from mljax.report.sections import clock, shown

IMAGES = 12  # most wrong images on the page
_PAIRS = 20  # confusions in the table
_MATRIX = 14  # labels in the matrix of confusions
_SAID = 8  # labels under an image
_SUGGESTED = (
    "No thresholds are kept with these weights: a label is said above 0.5. Here is a "
    "suggestion, what mljax.thresholds chooses on these images, for F1; run it to keep "
    "them. Chosen and measured on the same images: on new ones the gain is smaller, "
    "most of all for labels with few images."
)


def thresholds(run: RunData) -> Markup:
    """The threshold of each label that is kept with the weights, beside 0.5.

    Where none are kept, those that `mljax.thresholds` would choose on these images.
    """
    found = run.evaluation
    if found is None and run.kept is None:
        return Markup("")
    if run.kept is not None:
        name, text = "kept threshold", _about_kept(run)
        chosen = run.kept.thresholds
    elif found is not None:
        name, text = "suggested threshold", _SUGGESTED
        chosen = operating_points.choose(found.p, found.labels).thresholds
    columns = [page.Column("label", run.class_names)]
    if found is not None:
        columns.append(page.numbers("images", (found.labels == 1).sum(0), 0))
    columns.append(page.numbers(name, chosen, 3))
    if found is not None:
        text += (
            " Precision P, recall R and F1 in percent are of the validation images, as "
            "is F1 at 0.5 of the probabilities as trained."
        )
        quality = numbers.at_thresholds(found.p, found.labels, chosen)
        plain = numbers.at_thresholds(found.trained_p, found.labels, DEFAULT)
        there = (found.labels == 1).any(0)
        columns += [
            page.numbers(title, np.where(there, 100 * values, np.nan))
            for title, values in (
                ("P", quality.precision),
                ("R", quality.recall),
                ("F1", quality.f1),
                ("F1 at 0.5", plain.f1),
            )
        ]
    return page.joined([page.note(text), page.table(columns, sortable=True)])


def _about_kept(run: RunData) -> str:
    """How the thresholds were chosen, as far as their file tells."""
    assert run.kept is not None
    about = run.kept.about
    text = "Kept with these weights: mljax.predict and mljax.export use them."
    if "for" in about and "on" in about:
        text += f" Chosen for {about['for']} on {about['on']}."
    if run.kept.calibration is not None:
        text += " They are of the calibrated probability."
    before, after = about.get("before"), about.get("after")
    if isinstance(before, dict) and isinstance(after, dict):
        gains = [
            f"{name} {100 * before[name]:.2f} at 0.5, {100 * after[name]:.2f} with them"
            for name in ("OF1", "CF1")
            if all(isinstance(each.get(name), float) for each in (before, after))
        ]
        if gains:
            text += (
                " Chosen on one half of those images and measured on the other: "
                f"{'; '.join(gains)}."
            )
    return text


def confusions(run: RunData) -> Markup:
    """Which labels are said where another one is missed."""
    if run.evaluation is None:
        return Markup("")
    p, labels, names = run.evaluation.p, run.evaluation.labels, run.class_names
    above = run.evaluation.thresholds
    count = numbers.confusions(p, labels, above)
    missed = ((labels == 1) & (p <= above)).sum(0)
    pairs = [
        divmod(int(k), len(names))
        for k in np.argsort(-count, axis=None, kind="stable")[:_PAIRS]
        if count.flat[k] > 0
    ]
    if not pairs:
        return page.paragraph("No image has a label missed and another wrongly said.")
    share = [100 * count[i, j] / missed[i] for i, j in pairs]
    columns = [
        page.Column("missed", [names[i] for i, _ in pairs]),
        page.Column("said instead", [names[j] for _, j in pairs]),
        page.numbers("images", [count[i, j] for i, j in pairs], 0),
        page.numbers("of the misses, %", share, 0),
    ]
    text = (
        f"Images in which one label is missed and another is said that is not there "
        f"({_rule(run)}). A label that is often said wrongly stands beside many others."
    )
    parts = [page.note(text), page.table(columns, sortable=True)]
    shown = _most_confused(count)
    if len(shown) > 2:
        parts += [
            page.note("Rows: missed. Columns: said instead."),
            _matrix(count, shown, names),
        ]
    return page.joined(parts)


def _rule(run: RunData) -> str:
    """When a label is said, in words."""
    if run.kept is None:
        return f"said: above {DEFAULT}"
    return "said: above its kept threshold"


def _most_confused(count: np.ndarray) -> list[int]:
    """The labels of the strongest pairs, those that go together side by side."""
    found: list[int] = []
    for k in np.argsort(-count, axis=None, kind="stable"):
        pair = divmod(int(k), len(count))
        new = [label for label in pair if label not in found]
        if count.flat[k] == 0 or len(found) + len(new) > _MATRIX:
            break
        found += new
    return found


def _matrix(count: np.ndarray, shown: list[int], names: list[str]) -> Markup:
    heads = page.joined(
        Markup('<th scope="col"><div>{}</div></th>').format(names[j]) for j in shown
    )
    most = max(1, count[np.ix_(shown, shown)].max())
    rows = []
    for i in shown:
        cells = page.joined(
            Markup('<td style="--v:{:.0f}%">{}</td>').format(
                60 * count[i, j] / most, count[i, j] or ""
            )
            for j in shown
        )
        head = Markup('<th scope="row">{}</th>').format(names[i])
        rows.append(Markup("<tr>{}{}</tr>").format(head, cells))
    return Markup(
        '<div class="scroll"><table class="matrix"><thead><tr><td></td>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(heads, page.joined(rows))


def label_graph(run: RunData) -> Markup:
    """The graph of a gcn or gat head, as training counted it."""
    if run.graph is None:
        return Markup("")
    names = [str(name) for name in run.graph["class_names"]]
    together, tau = run.graph["cooccurrence"], float(run.graph["tau"])
    with charts.style():
        figure = label_graph_picture.figure(
            names,
            together,
            tau,
            ink=charts.INK,
            faint=charts.SOFT,
            weak_and_strong=charts.FADED,
            scale=False,
        )
    svg = charts.embedded(figure, f"Label graph of {run.name}")
    graph = label_graph_data.LabelGraph(names, together, np.zeros(0), tau, [])
    lines = [
        line.removeprefix("graph:").strip() for line in label_graph_data.report(graph)
    ]
    lines.append("The stronger an arrow, the higher the probability.")
    return page.joined(
        [
            page.note(page.joined(lines, Markup("<br>"))),
            Markup('<div class="graph">{}</div>').format(svg),
        ]
    )


def most_wrong(run: RunData) -> Markup:
    """The images with the highest loss, and where their worst label comes from."""
    if run.evaluation is None:
        return Markup("")
    found = run.evaluation
    rows = numbers.most_wrong(found.p, found.labels, IMAGES, found.thresholds)
    if not len(rows):
        return page.paragraph(f"Every label of every image is right ({_rule(run)}).")
    text = Markup(
        "The images with the highest loss. <span class='right'>Right</span>, "
        "<span class='wrong'>wrongly said</span> and <span class='missed'>missed</span>"
        " labels with their probability in percent. The heat map shows what speaks for "
        "the label that is most wrongly said, or missed if none is said wrongly: the "
        "brighter a place, the more. A label is {}."
    ).format(_rule(run).replace(":", ""))
    figures = page.joined(_figure(run, found, row) for row in rows)
    return page.joined(
        [page.note(text), Markup('<div class="photos">{}</div>').format(figures)]
    )


def _figure(run: RunData, found: Evaluation, row: int) -> Markup:
    names, p, labels = run.class_names, found.p[row], found.labels[row]
    photo = found.source.read(int(found.places[row])).numpy()
    losses = numbers.entry_losses(p, labels)
    is_said = p > found.thresholds
    wrongly, missed = is_said & (labels == 0), ~is_said & (labels == 1)
    bad = wrongly if wrongly.any() else missed
    worst = int(np.argmax(np.where(bad, losses, -1)))
    images = [page.picture(pictures.shrink(photo, 300), "the image")]
    kind = "missed" if labels[worst] == 1 else "wrong"
    if run.explainer is not None:
        (maps,) = run.explainer.heatmaps([photo], [names[worst]])
        drawn = heatmap_pictures.overlay(
            photo, maps.maps[0], maps.inside, maps.part, 300
        )
        images.append(page.picture(drawn, f"heat map of {names[worst]}"))
    said = []
    for c in np.argsort(-p, kind="stable"):
        predicted, true = is_said[c], labels[c] == 1
        if labels[c] == -1 or not (predicted or true):
            continue
        css = ("right" if true else "wrong") if predicted else "missed"
        said.append(
            Markup('<span class="said {}">{} {:.0f}</span> ').format(
                css, names[c], 100 * p[c]
            )
        )
    if len(said) > _SAID:
        said = [*said[:_SAID], Markup("and {} more").format(len(said) - _SAID)]
    return Markup(
        '<figure><div class="pair">{}</div><figcaption>{}<br>{}<br>heat map: '
        '<span class="{}">{}</span></figcaption></figure>'
    ).format(
        page.joined(images),
        page.joined(said),
        short_path(found.source.names[found.places[row]]),
        kind,
        names[worst],
    )


def short_path(path: str) -> str:
    """The last two parts, which tell images apart."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])


def costs(run: RunData) -> Markup:
    """Speed and memory of training and of prediction."""
    rows: list[tuple[str, str]] = []
    speeds = run.curves.values.get("train/images_per_second")
    if speeds is not None:
        rows.append(("training", f"{np.median(speeds[1]):.1f} images/s (median)"))
    if run.curves.seconds:
        rows.append(("training, all of it", clock(run.curves.seconds)))
    peak = run.curves.values.get("train/memory_gb")
    if peak is not None:
        rows.append(("memory in training, at most", size(1e9 * peak[1].max())))
    if run.costs is not None:
        for count, ms, memory in zip(
            speed.SIZES, run.costs.milliseconds, run.costs.activations, strict=True
        ):
            what = f"prediction, a batch of {count}"
            text = f"{ms:.1f} ms, {1000 * count / ms:.0f} images/s"
            if memory is not None:
                text += f", {size(memory)} beside the weights"
            rows.append((what, text))
        rows.append(("predictions were timed on", run.costs.device))
        rows.append(("parameters", f"{run.costs.parameters:,}"))
        rows.append(("weights in memory", size(run.costs.weights)))
    if not rows:
        return Markup("")
    names, values = zip(*rows, strict=True)
    text = (
        "Predictions: uint8 images in memory to probabilities, without reading files, "
        "the median; measured while this page was made. What the machine did beside "
        "is in it."
    )
    table = page.table([page.Column("what", names), page.Column("measured", values)])
    return page.joined([table, page.note(text) if run.costs else Markup("")])


def size(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def settings(run: RunData) -> Markup:
    """What differs from the defaults, and all of it folded away."""
    flat, defaults = configs.flatten(run.config), configs.flatten(configs.common())
    keys = [key for key in flat if flat[key] != defaults[key]]
    columns = [
        page.Column("setting", keys, css="value"),
        page.Column("this run", [shown(flat[key]) for key in keys], css="value"),
        page.Column("default", [shown(defaults[key]) for key in keys], css="value"),
    ]
    whole = json.dumps(run.config.to_dict(), indent=2, ensure_ascii=False)
    return page.joined(
        [
            page.note("Settings that differ from the defaults:"),
            page.table(columns),
            page.details("All settings", Markup("<pre>{}</pre>").format(whole)),
        ]
    )


def programs(run: RunData) -> Markup:
    """The versions that trained the best weights, and those that made this page."""
    now, then = versions.installed(), run.about.get("versions", {})
    columns = [page.Column("program", list(now))]
    if then:
        columns.append(page.Column("trained with", [then.get(n, "") for n in now]))
    columns.append(page.Column("this page", list(now.values())))
    text = "" if then else "The versions that trained this run were not kept with it."
    return page.joined([page.note(text) if text else "", page.table(columns)])


def sections(run: RunData) -> list[tuple[str, Markup]]:
    """(heading, content) of each; empty content is left out."""
    return [
        ("Thresholds", thresholds(run)),
        ("Confusions between labels", confusions(run)),
        ("Label graph", label_graph(run)),
        ("Most wrong images", most_wrong(run)),
        ("Speed and memory", costs(run)),
        ("Settings", settings(run)),
        ("Versions", programs(run)),
    ]
