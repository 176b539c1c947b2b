"""Heat maps drawn over photos."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mljax import pictures
from mljax.images import Box

if TYPE_CHECKING:
    from mljax.heatmaps import Heatmaps

WHOLE = Box()
SIDE = 360  # pixels: longer side of a photo in a picture
_COLOURS = "inferno"  # ends bright: the hottest place stands out on any photo
_STRONGEST = 0.75  # how far the hottest place is covered


def stretch(
    values: np.ndarray,
    size: tuple[int, int],
    inside: Box = WHOLE,
    part: Box = WHOLE,
) -> np.ndarray:
    """A map [rows, columns] over a photo, bicubic: float32 [height, width].

    Args:
        values: the map, over the network's image.
        size: (height, width) of the photo.
        inside, part: how the photo lies there, from `images.seen`. Where the network
            saw nothing of the photo, the result has the lowest value of the map.
    """
    from PIL import Image

    image = Image.fromarray(np.asarray(values, np.float32))
    rows, columns = values.shape
    box = (
        inside.left * columns,
        inside.top * rows,
        inside.right * columns,
        inside.bottom * rows,
    )
    top, bottom = round(part.top * size[0]), round(part.bottom * size[0])
    left, right = round(part.left * size[1]), round(part.right * size[1])
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    bicubic = Image.Resampling.BICUBIC
    over = np.full(size, np.min(values), np.float32)
    over[top:bottom, left:right] = np.asarray(
        image.resize((right - left, bottom - top), bicubic, box=box)
    )
    return over


def overlay(
    photo: np.ndarray,
    values: np.ndarray,
    inside: Box = WHOLE,
    part: Box = WHOLE,
    side: int = SIDE,
) -> np.ndarray:
    """The photo with a map [rows, columns] over it: uint8 [height, width, 3].

    Colours run from the map's coldest place (the photo as it is, a little darker) to
    its hottest, whatever the numbers are: they compare places, not labels or photos.
    The longer side becomes at most `side` pixels. `inside` and `part` as in `stretch`.
    """
    from matplotlib import colormaps

    small = pictures.shrink(photo, side)
    heat = stretch(values, small.shape[:2], inside, part)
    low, high = heat.min(), heat.max()
    is_flat = high - low <= 1e-5 * max(abs(high), abs(low))  # apart from rounding
    heat = np.zeros_like(heat) if is_flat else (heat - low) / (high - low)
    colour = 255 * colormaps[_COLOURS](heat)[..., :3]
    cover = _STRONGEST * (0.25 + 0.75 * heat[..., None])
    return np.rint(small * (1 - cover) + colour * cover).astype(np.uint8)


def draw(file: Path, photo: np.ndarray, found: "Heatmaps") -> None:
    """Writes a PNG: the photo, and beside it the photo under each map."""
    # The object interface: pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("", pictures.shrink(photo, SIDE))]
    for label, p, values in zip(*found[:3], strict=True):
        panels.append(
            (
                f"{label} {100 * p:.0f} %",
                overlay(photo, values, found.inside, found.part),
            )
        )
    height, width = panels[0][1].shape[:2]
    # A pixel of the photo is a pixel of the picture; titles have room for 28 letters.
    across, above, dpi = max(width, 180), 28, 100
    size = len(panels) * (across + 8) + 8, height + above + 8
    figure = Figure(figsize=(size[0] / dpi, size[1] / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    for i, (title, image) in enumerate(panels):
        left = 8 + i * (across + 8)
        figure.text(
            left / size[0],
            1 - 8 / size[1],
            title if len(title) < 30 else f"{title[:20]}...{title[-6:]}",
            fontsize=9,
            va="top",
            parse_math=False,
        )
        box = left / size[0], 8 / size[1], width / size[0], height / size[1]
        axis = figure.add_axes(box)
        axis.set_axis_off()
        axis.imshow(image, interpolation="nearest", aspect="auto")
    pictures.save(figure, file)
