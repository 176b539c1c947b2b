"""Pictures for people: what was predicted, drawn under each image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SHEET = 24  # images on one sheet
_COLUMNS = 6
_SIDE = 2.2
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
    threshold: float = 0.5,
) -> None:
    """Writes a PNG: each image with the labels predicted for it.

    Green: predicted and true. Red: predicted, not true. Brown: true, not predicted;
    each with its probability in percent. Without labels all are black.

    Args:
        file: the PNG to write.
        images: uint8 [height, width, 3] each, of any size.
        probabilities: [num_images, num_classes].
        labels: [num_images, num_classes] in {1, 0, -1}, or None.
        class_names: of the columns.
        threshold: predicted means above it.
    """
    # The object interface: pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(1, len(images)))
    rows = -(-len(images) // columns)
    # In inches: each image is _SIDE wide, with room for six labels below it.
    figure = Figure(figsize=(_SIDE * columns, (_SIDE + 1.0) * rows + 0.3), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    truth = [None] * len(images) if labels is None else labels
    for axis, image, p, t in zip(axes, images, probabilities, truth, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_anchor("N")
        for line, (text, colour) in enumerate(_lines(p, t, class_names, threshold)):
            axis.annotate(
                text,
                (0, 0),
                (0, -3 - 10.5 * line),
                xycoords="axes fraction",
                textcoords="offset points",
                color=colour,
                fontsize=8,
                va="top",
            )
    key = "green: right    red: predicted, not labelled    brown: labelled, missed"
    if labels is None:
        key = f"labels with a probability above {100 * threshold:g} %"
    figure.text(0.01, 1 - 0.05 / figure.get_figheight(), key, fontsize=9, va="top")
    height = figure.get_figheight()
    figure.subplots_adjust(
        0.01, 0.95 / height, 0.99, 1 - 0.3 / height, wspace=0.08, hspace=0.95 / _SIDE
    )
    figure.savefig(file)


def _lines(
    p: np.ndarray, t: np.ndarray | None, class_names: Sequence[str], threshold: float
) -> list[tuple[str, str]]:
    """At most six, the most probable first: (text, colour)."""
    found = []
    for i in np.argsort(-p):
        predicted, true = p[i] > threshold, t is not None and t[i] == 1
        if not (predicted or true):
            continue
        kind = ("right" if true else "wrong") if predicted else "missed"
        colour = _COLOURS["unknown" if t is None else kind]
        found.append((f"{class_names[i]} {100 * p[i]:.0f}", colour))
    return found[:6] or [("(none)", "#555555")]
