"""Charts as SVG inside the page: drawn by matplotlib, coloured by the page's CSS."""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from markupsafe import Markup

SIZE = (3.5, 2.4)  # inches; a phone shows one chart in a row, a desktop four
# These stand for the colours of the CSS, which differ between light and dark.
INK, FAINT, SOFT = "#010101", "#020202", "#020201"
SERIES = [f"#0300{i:02x}" for i in range(8)]
FADED = (3 / 255, 0.0, 0.0, 0.25), (3 / 255, 0.0, 0.0, 1.0)  # SERIES[0]
_COLOURS = {INK: "var(--ink)", FAINT: "var(--line)", SOFT: "var(--soft)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(SERIES)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, in the page's font
    "text.parse_math": False,  # a name with a dollar is no formula
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelspacing": 0.3,
    "legend.handlelength": 1.5,
    "legend.labelcolor": INK,
}


def chart(
    title: str,
    plot: Callable[[Any], None],
    *,
    x: str,
    y: str,
    size: tuple[float, float] = SIZE,
) -> Markup:
    """A chart. `plot` draws on matplotlib's axes in INK, FAINT and SERIES."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        return embedded(figure, title)


def style() -> AbstractContextManager[None]:
    """Matplotlib draws as this page needs it, inside a `with`."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def embedded(figure: Any, title: str) -> Markup:
    """A figure as an <svg> that fills its place on the page."""
    import matplotlib

    file = io.StringIO()
    # The salt makes names unique on the page, and the same at every run.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    for name in set(re.findall(r' id="([^"]*)"', rest)):
        if f"#{name}" not in rest:
            rest = rest.replace(f' id="{name}"', "")
    for colour, variable in _COLOURS.items():
        rest = rest.replace(colour, variable)
    rest = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", rest)
    rest = re.sub(r"\s*\n\s*", "\n", rest)
    label = Markup.escape(title)
    return Markup(f'<svg {box[0]} role="img" aria-label="{label}">{rest}')


def lines(
    title: str,
    series: Sequence[tuple[str, np.ndarray, np.ndarray, str, int]],
    *,
    x: str,
    y: str,
) -> Markup:
    """Curves over whole numbers: (name, x, y, line style, number of the colour)."""
    from matplotlib.ticker import MaxNLocator

    def plot(axes: Any) -> None:
        for name, xs, ys, style, colour in series:
            few = "o" if len(xs) < 12 else ""
            axes.plot(
                xs,
                ys,
                style,
                marker=few,
                markersize=3,
                color=SERIES[colour % len(SERIES)],
                label=shortened(name),
            )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(series) > 1:
            axes.legend()

    return chart(title, plot, x=x, y=y)


def shortened(name: str, most: int = 28) -> str:
    """A name that fits a legend; matplotlib leaves out those with a leading _."""
    name = name if len(name) <= most else f"{name[: most - 9]}...{name[-6:]}"
    return f" {name}" if name.startswith("_") else name


def sparkline(xs: np.ndarray, ys: np.ndarray, title: str) -> Markup:
    """A curve inside the unit square, as small as a line of text."""
    points = " ".join(
        f"{60 * x:.1f},{20 - 20 * y:.1f}" for x, y in zip(xs, ys, strict=True)
    )
    return Markup(
        '<svg class="spark" viewBox="-1 -1 62 22" role="img" aria-label="{}">'
        '<polyline points="{}"/></svg>'
    ).format(title, points)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the curve, for eyes that follow a trend."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
