"""The page as HTML. `Markup(...).format(...)` escapes all that is not Markup itself."""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

_HERE = Path(__file__).parent

# Nothing may be fetched, and no script runs but the page's own.
_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
""")


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: in its head.
        cells: texts or Markup; None is an empty cell.
        keys: numbers to sort by, which also puts the column to the right.
        css: class of the cells.
    """

    name: str
    cells: Sequence[Any]
    keys: Sequence[float] | None = None
    css: str = ""


def page(title: str, body: Iterable[Markup]) -> str:
    """The whole file."""
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return _PAGE.format(
        title=title,
        body=Markup("\n").join(body),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=base64.b64encode(digest).decode(),
    )


def section(title: str, content: Markup) -> Markup:
    head = Markup('<h2 id="{}">{}</h2>\n').format(_anchor(title), title)
    return head + content


def heading(title: str) -> Markup:
    return Markup("<h3>{}</h3>").format(title)


def navigation(titles: Iterable[str]) -> Markup:
    """Links to the sections of these titles."""
    links = (
        Markup('<a href="#{}">{}</a> ').format(_anchor(title), title)
        for title in titles
    )
    return Markup("<nav>{}</nav>").format(joined(links))


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def paragraph(text: str | Markup, css: str = "") -> Markup:
    return Markup('<p class="{}">{}</p>').format(css, text)


def note(text: str | Markup) -> Markup:
    return paragraph(text, "note")


def joined(parts: Iterable[Any], between: str = "") -> Markup:
    return Markup(between).join(parts)


def table(columns: Sequence[Column], *, sortable: bool = False) -> Markup:
    """A table that scrolls inside its own box."""
    kinds = [
        f"{'number ' if column.keys is not None else ''}{column.css}".strip()
        for column in columns
    ]
    heads = joined(
        Markup('<th scope="col" class="{}">{}</th>').format(
            "number" if column.keys is not None else "", column.name
        )
        for column in columns
    )
    rows = []
    for i in range(len(columns[0].cells)):
        cells = []
        for column, kind in zip(columns, kinds, strict=True):
            cell = "" if column.cells[i] is None else column.cells[i]
            key = Markup("")
            if column.keys is not None:
                value = column.keys[i]
                key = Markup(' data-v="{}"').format(
                    "" if np.isnan(value) else f"{value:.6g}"
                )
            cells.append(Markup('<td class="{}"{}>{}</td>').format(kind, key, cell))
        rows.append(Markup("<tr>{}</tr>").format(joined(cells)))
    return Markup(
        '<div class="scroll"><table class="{}"><thead><tr>{}</tr></thead>\n'
        "<tbody>{}</tbody></table></div>"
    ).format("sortable" if sortable else "", heads, joined(rows, "\n"))


def numbers(
    name: str, values: Iterable[float], digits: int = 1, bar: bool = False
) -> Column:
    """A column of numbers; NaN is an empty cell."""
    values = [float(v) for v in values]
    cells: list[str | Markup] = []
    for value in values:
        text = "" if np.isnan(value) else f"{value:.{digits}f}"
        if bar and text:
            cells.append(
                Markup(
                    '{}<span class="bar"><i style="width:{:.0f}%"></i></span>'
                ).format(text, min(100, max(0, value)))
            )
        else:
            cells.append(text)
    return Column(name, cells, values)


def cards(items: Iterable[tuple[str, str]]) -> Markup:
    """Figures with what they are: (value, name)."""
    return Markup('<div class="cards">{}</div>').format(
        joined(
            Markup('<div class="card"><b>{}</b><span>{}</span></div>').format(*item)
            for item in items
        )
    )


def charts(items: Iterable[Markup]) -> Markup:
    there = [item for item in items if item]
    if not there:
        return Markup("")
    each = joined(Markup("<div>{}</div>").format(item) for item in there)
    return Markup('<div class="charts">{}</div>').format(each)


def picture(pixels: np.ndarray, text: str) -> Markup:
    """An image [height, width, 3] inside the page, as a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/jpeg;base64,{}">').format(text, data)


def details(summary: str, body: Markup, css: str = "", is_open: bool = False) -> Markup:
    return Markup('<details class="{}"{}><summary>{}</summary>{}</details>').format(
        css, Markup(" open") if is_open else "", summary, body
    )
