"""The doctor's report as one HTML page. `Markup(...).format(...)` escapes all else."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from mljax.data.source import Source

_STYLE = Path(__file__).with_name("inspect.css")
_MOST_ROWS = 200  # of a list of images; report.json has all

# Nothing is fetched and nothing runs.
_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Data report: {title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<h1>Data report</h1>
<p class="soft">{title}</p>
{body}
</main>
</body>
</html>
""")


def page(
    report: Mapping[str, Any],
    sources: Mapping[str, Source],
    picked: Mapping[str, Sequence[tuple[int, np.ndarray]]],
    folder: Path,
) -> str:
    """The whole file.

    Args:
        report: what report.json holds.
        sources: the splits.
        picked: for each split (row, small picture) of some images.
        folder: where cooccurrence.png is.
    """
    data = report["data"]
    where = data["tfds_name"] or data["root"]
    title = f"{report['config']}: {data['name']} {where}"
    body = [
        _cards(report),
        _findings(report),
        _section("Splits", _splits(report["splits"])),
        _section("Labels", _labels(report)),
        _section("Labels an image", _histogram(report["splits"])),
        _section("Images", _images(report["splits"])),
        _section("Duplicates", _duplicates(report["duplicates"])),
        _section("Labels that go together", _pairs(report, folder)),
    ]
    for split, images in picked.items():
        photos = _photos(sources[split], images)
        body.append(_section(f"Some images of {split}", photos))
    style = Markup(_STYLE.read_text(encoding="utf-8"))
    return _PAGE.format(title=title, style=style, body=Markup("\n").join(body))


def _section(title: str, content: Markup) -> Markup:
    return Markup("<h2>{}</h2>\n{}").format(title, content)


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _cards(report: Mapping[str, Any]) -> Markup:
    splits = report["splits"]
    cards = [(f"{c['images']:,}", f"images of {s}") for s, c in splits.items()]
    cards.append((str(len(report["class_names"])), "classes"))
    per_image = splits["train"]["labels_per_image"]
    cards.append((f"{per_image:.2f}", "labels an image of train"))
    unreadable = sum(len(c["unreadable"]) for c in splits.values())
    cards.append((str(unreadable), "unreadable images"))
    leaks = sum(len(g["splits"]) > 1 for g in report["duplicates"])
    cards.append((str(leaks), "images in two splits"))
    html = Markup('<div class="card"><b>{}</b><span>{}</span></div>')
    return Markup('<div class="cards">{}</div>').format(
        _joined(html.format(*card) for card in cards)
    )


def _findings(report: Mapping[str, Any]) -> Markup:
    item = Markup('<li class="{0}"><b>{0}</b>{1}</li>')
    items = _joined(item.format(f["level"], f["text"]) for f in report["findings"])
    return Markup('<ul class="found">{}</ul>').format(items)


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()
) -> Markup:
    """A table that scrolls inside its own box; `numbers`: columns set to the right."""
    right = set(numbers)

    def cells(tag: str, values: Sequence[Any]) -> Markup:
        cell = Markup("<{0}{1}>{2}</{0}>")
        css = (Markup(' class="n"') if i in right else "" for i in range(len(values)))
        return _joined(cell.format(tag, c, v) for c, v in zip(css, values, strict=True))

    body = _joined(Markup("<tr>{}</tr>").format(cells("td", row)) for row in rows)
    return Markup(
        '<div class="scroll"><table><thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(cells("th", heads), body)


def _splits(splits: Mapping[str, Any]) -> Markup:
    heads = ["", "images", "labels", "an image", "without label", "unknown labels"]
    heads.append("classes without positive")
    rows = [
        [
            name,
            f"{c['images']:,}",
            f"{c['labels']:,}",
            f"{c['labels_per_image']:.2f}",
            f"{c['images_without_labels']:,}",
            f"{c['unknown_labels']:,}",
            len(c["classes_without_positives"]),
        ]
        for name, c in splits.items()
    ]
    return _table(heads, rows, range(1, 7))


def _key(splits: Iterable[str]) -> Markup:
    return _joined(
        Markup('<span class="key bar {0}"></span>{0}').format(s) for s in splits
    )


def _bars(shares: Mapping[str, float], largest: float) -> Markup:
    bar = Markup('<i class="bar {}" style="width:{:.1f}%"></i>')
    return _joined(
        bar.format(split, 100 * share / (largest or 1))
        for split, share in shares.items()
    )


def _labels(report: Mapping[str, Any]) -> Markup:
    splits = list(report["splits"])
    classes = sorted(report["classes"], key=lambda row: -row["train"]["positives"])
    largest = max((row[s]["share"] or 0 for row in classes for s in splits), default=0)
    has_unknown = any(row[s]["unknown"] for row in classes for s in splits)
    heads = ["label", *splits, *(["unknown"] if has_unknown else []), "share", "weight"]
    rows = []
    for row in classes:
        shares = {s: row[s]["share"] or 0 for s in splits}
        unknown = sum(row[s]["unknown"] for s in splits)
        rows.append(
            [
                row["name"],
                *(f"{row[s]['positives']:,}" for s in splits),
                *([f"{unknown:,}"] if has_unknown else []),
                Markup("{}{}").format(
                    _percent(shares["train"]), _bars(shares, largest)
                ),
                f"{report['class_weights'][row['name']]:.2f}",
            ]
        )
    numbers = [*range(1, len(heads) - 2), len(heads) - 1]
    about = Markup(
        "<p>Images with each label, and their share of those in which the label is "
        "known:{} The weights are in <code>class_weights.json</code>, for "
        "<code>--config.loss.class_weights</code>: 1 / &radic;share, with a mean of 1, "
        "between 0.2 and 5.</p>"
    ).format(_key(splits))
    return about + _table(heads, rows, numbers)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _histogram(splits: Mapping[str, Any]) -> Markup:
    counts = {s: c["images_by_number_of_labels"] for s, c in splits.items()}
    numbers = sorted({int(n) for found in counts.values() for n in found})
    shares = [
        {s: counts[s].get(str(n), 0) / splits[s]["images"] for s in splits}
        for n in numbers
    ]
    largest = max(v for row in shares for v in row.values())
    rows = [
        [n, *(f"{counts[s].get(str(n), 0):,}" for s in splits), _bars(row, largest)]
        for n, row in zip(numbers, shares, strict=True)
    ]
    heads = ["labels", *splits, Markup("share of the images{}").format(_key(splits))]
    return _table(heads, rows, range(len(heads) - 1))


def _images(splits: Mapping[str, Any]) -> Markup:
    rows = [
        [name, what, *(f"{v:,}" for v in values)]
        for name, counts in splits.items()
        for what, values in (
            (k.replace("_", " "), v) for k, v in counts["sizes_min_median_max"].items()
        )
    ]
    parts = [_table(["", "pixels", "least", "median", "most"], rows, (2, 3, 4))]
    for name, counts in splits.items():
        lists: list[tuple[str, list[list[Any]], list[str]]] = [
            (
                "unreadable",
                [[i["name"], i["reason"]] for i in counts["unreadable"]],
                ["image", "reason"],
            )
        ]
        for kind in ("tiny", "huge"):
            sized = [[i["name"], i["width"], i["height"]] for i in counts[kind]]
            lists.append((kind, sized, ["image", "width", "height"]))
        for trait, images in counts["unusual"].items():
            lists.append((trait, [[image] for image in images], ["image"]))
        for kind, found, heads in lists:
            parts.append(_listed(f"{name}: {kind}", found, heads))
    return _joined(parts)


def _listed(title: str, rows: list[list[Any]], heads: list[str]) -> Markup:
    """A list that opens; nothing where there is nothing."""
    if not rows:
        return Markup("")
    more = len(rows) - _MOST_ROWS
    rest = f" (the first {_MOST_ROWS}; all are in report.json)" if more > 0 else ""
    return Markup("<details><summary>{}: {:,}{}</summary>{}</details>").format(
        title, len(rows), rest, _table(heads, rows[:_MOST_ROWS])
    )


def _duplicates(groups: Sequence[Mapping[str, Any]]) -> Markup:
    if not groups:
        return Markup("<p>No two images have the same bytes.</p>")
    line = Markup("<div>{}: {}</div>")
    rows = [
        [
            " and ".join(group["splits"]),
            "differ" if group["labels_differ"] else "agree",
            _joined(line.format(i["split"], i["name"]) for i in group["images"]),
        ]
        for group in groups
    ]
    about = Markup("<p>Images with the same bytes.</p>")
    return about + _listed("groups", rows, ["splits", "labels", "images"])


def _pairs(report: Mapping[str, Any], folder: Path) -> Markup:
    rows = [
        [p["of"], p["have"], _percent(p["share"])] for p in report["strongest_pairs"]
    ]
    about = Markup(
        "<p>Of the images of train with the first label, how many have the second.</p>"
    )
    picture = (folder / "cooccurrence.png").read_bytes()
    graph = Markup(
        '<div class="graph"><img alt="labels on a circle, an arrow for each pair" '
        'src="data:image/png;base64,{}"></div>'
    ).format(base64.b64encode(picture).decode())
    return about + _table(["of", "have", "share"], rows, (2,)) + graph


def _photos(source: Source, images: Sequence[tuple[int, np.ndarray]]) -> Markup:
    if not images:
        return Markup("<p>None can be read.</p>")
    figures = []
    for row, pixels in images:
        labels = source.labels[row]
        chip = Markup('<span class="label{}">{}</span>')
        names = [
            chip.format("", source.class_names[i]) for i in np.flatnonzero(labels > 0)
        ]
        names += [
            chip.format(" unknown", f"{source.class_names[i]} ?")
            for i in np.flatnonzero(labels == -1)
        ]
        figures.append(
            Markup(
                '<figure><img alt="" src="data:image/jpeg;base64,{}">{}'
                "<figcaption>{}</figcaption></figure>"
            ).format(
                _jpeg(pixels),
                _joined(names[:12]) or Markup('<span class="soft">no label</span>'),
                Path(source.names[row]).name,
            )
        )
    return Markup('<div class="photos">{}</div>').format(_joined(figures))


def _jpeg(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
