"""Pictures for people: what was predicted, drawn under each image."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mljax import whole
from mljax.label_text import all_scripts, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET = 24  # images on one sheet
_COLUMNS = 6
_SIDE = 2.2  # inches
_DPI = 100
_MOST_LINES = 6  # under an image
_MOST_LETTERS = 33  # in a line of these
_COLOURS = {
    "right": "#1a7f37",
    "wrong": "#c62828",
    "missed": "#8a6d00",
    "unknown": "#111111",
}


def sheet(
    file: Path,
    images: Sequence[np.ndarray],
    probabilities: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str],
    threshold: float | np.ndarray = 0.5,
) -> None:
    """Writes a PNG: each image with the labels predicted for it.

    Green: predicted and true. Red: predicted, not true. Brown: true, not predicted.
    Black: predicted, and not known to be true or not; each with its probability in
    percent. Without labels all are black.

    Args:
        file: the PNG to write.
        images: uint8 [height, width, 3] each, of any size.
        probabilities: [num_images, num_classes].
        labels: [num_images, num_classes] in {1, 0, -1}, or None.
        class_names: of the columns.
        threshold: predicted means above it; a number, or [num_classes].
    """
    truth = [None] * len(images) if labels is None else labels
    above = np.broadcast_to(threshold, len(class_names))
    lines = [
        _lines(p, t, class_names, above)
        for p, t in zip(probabilities, truth, strict=False)
    ]
    key = "green: right    red: predicted, not labelled    brown: labelled, missed"
    if labels is not None and (labels[: len(images)] == -1).any():
        key += "    black: unknown"
    if labels is None:
        key = "labels with a probability above their thresholds"
        if above.min() == above.max():
            key = f"labels with a probability above {100 * above.min():.3g} %"
    with all_scripts():
        _draw(file, images, lines, key)


def contact_sheet(
    file: Path,
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes a PNG: each image with its labels; unknown ones are brown, with a "?".

    Args:
        file: the PNG to write.
        images: uint8 [height, width, 3] each, of any size.
        labels: [num_images, num_classes] in {1, 0, -1}.
        class_names: of the columns.
    """
    lines = []
    names = [shorten(name, _MOST_LETTERS - 2) for name in class_names]
    for row in labels:
        present, unknown = (np.flatnonzero(row == v).tolist() for v in (1, -1))
        found = [(names[i], _COLOURS["unknown"]) for i in present]
        found += [(f"{names[i]} ?", _COLOURS["missed"]) for i in unknown]
        more = [(f"and {len(found) - 5} more", "#555555")] * (len(found) > _MOST_LINES)
        shown = found[: _MOST_LINES - len(more)] + more
        lines.append(shown or [("(none)", "#555555")])
    with all_scripts():
        _draw(file, images, lines, "the labels of each image; brown, ?: unknown")


def shrink(photo: np.ndarray, side: int = round(_SIDE * _DPI)) -> np.ndarray:
    """The photo, uint8 [height, width, 3], with a longer side of at most `side` pixels;
    by default that of an image on a sheet."""
    from PIL import Image

    height, width = photo.shape[:2]
    factor = min(1.0, side / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    if size == (width, height):
        return photo
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))


def save(figure: "Figure", file: Path) -> None:
    """Writes a PNG whole or not at all. Raises OSError, which names it."""
    with whole.replacing(file) as part:
        figure.savefig(part, format="png")


def _draw(
    file: Path,
    images: Sequence[np.ndarray],
    lines: Sequence[Sequence[tuple[str, str]]],
    key: str,
) -> None:
    """The images on a grid with (text, colour) lines under each, and a key on top."""
    # The object interface: pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    # In inches: an image, at most _SIDE wide and high, and the lines below it.
    ratios = [image.shape[0] / image.shape[1] for image in images]
    tall = _SIDE * min(1.0, max(ratios, default=1.0))
    below = 0.05 + 0.15 * max((len(texts) for texts in lines), default=1)
    height = (tall + below) * rows + 0.3
    figure = Figure(figsize=(_SIDE * columns, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, texts in zip(axes, images, lines, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_anchor("NW")
        for line, (text, colour) in enumerate(texts):
            axis.annotate(
                text,
                (0, 0),
                (0, -3 - 10.5 * line),
                xycoords="axes fraction",
                textcoords="offset points",
                color=colour,
                fontsize=8,
                va="top",
                parse_math=False,  # a name with a dollar is no formula
            )
    figure.text(0.01, 1 - 0.05 / height, key, fontsize=9, va="top")
    figure.subplots_adjust(
        0.01, below / height, 0.99, 1 - 0.3 / height, wspace=0.08, hspace=below / tall
    )
    save(figure, file)


def _lines(
    p: np.ndarray, t: np.ndarray | None, class_names: Sequence[str], above: np.ndarray
) -> list[tuple[str, str]]:
    """At most six, the most probable first: (text, colour)."""
    found = []
    for i in np.argsort(-p):
        predicted, true = p[i] > above[i], t is not None and t[i] == 1
        if not (predicted or true):
            continue
        kind = ("right" if true else "wrong") if predicted else "missed"
        colour = _COLOURS["unknown" if t is None or t[i] == -1 else kind]
        name = shorten(class_names[i], _MOST_LETTERS - 4)
        found.append((f"{name} {100 * p[i]:.0f}", colour))
    return found[:_MOST_LINES] or [("(none)", "#555555")]
