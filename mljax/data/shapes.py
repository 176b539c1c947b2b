"""The embedded data set: pictures of shapes, drawn from (seed, split, index).

It needs no download and yet has what makes multi-label data hard: several objects a
picture, small and large, apart or overlapping, over an uneven background with strokes
and specks that mean nothing. The labels are what a person would answer to "what is in
this picture?":

    kinds      circle crescent cross ring square star triangle
    colours    blue green red yellow: a shape has it (black and white have no label)
    relations  crowd (five or more small shapes alike), overlap (one shape covers a
               part of another), striped (a shape has stripes)

One to five a picture, and they depend on each other: a star is yellow, a cross is red
or neutral, a crescent is never green, triangles are mostly green; only circles and
squares are striped; only circles, squares and triangles come in crowds; a crowd
excludes overlap and any other kind; ring and square never meet.
"""

import math
from dataclasses import replace

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mljax.data.shapes_draw import HUES, KINDS, Shape, background, cover, disturb, draw
from mljax.data.source import Source
from mljax.errors import UserError
from mljax.images import sides_of

CLASS_NAMES = sorted([*KINDS, *HUES, "crowd", "overlap", "striped"])

_MAX_DRAWN = 128  # pixels; larger pictures are drawn at this size and enlarged
_SPLITS = ("train", "val")


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """data.num_train and data.num_val pictures; the same seed gives the same pictures.

    Raises UserError where one of the numbers is not positive.
    """
    return {
        split: _source(data_config, seed, split, data_config[f"num_{split}"])
        for split in _SPLITS
    }


def _source(data_config: ConfigDict, seed: int, split: str, count: int) -> Source:
    if count < 1:
        raise UserError(f"data.num_{split}={count}: shapes needs at least one picture")
    size = min(*sides_of(data_config), _MAX_DRAWN)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.zeros((count, len(CLASS_NAMES)), np.int8)

    # All at once, not image by image in the pipeline: an image drawn once serves every
    # epoch, and Python threads drawing would hold up the training loop.
    for i in range(count):
        images[i], present = picture(seed, split, i, size)
        labels[i, [CLASS_NAMES.index(name) for name in present]] = 1
    tensor = tf.constant(images)
    return Source(
        class_names=CLASS_NAMES,
        labels=labels,
        names=[f"shapes {split} {i} (seed {seed})" for i in range(count)],
        read=lambda index: tf.gather(tensor, index),
        split=split,
    )


def picture(
    seed: int, split: str, index: int, size: int
) -> tuple[np.ndarray, set[str]]:
    """One picture, uint8 [size, size, 3], and the names of its labels."""
    key = np.array([seed % 2**64, _SPLITS.index(split) * 2**32 + index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    shapes, labels = _scene(rng)
    image = background(rng, size)
    for shape in shapes:
        draw(rng, image, shape)
    disturb(rng, image)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), labels


def _scene(rng: np.random.Generator) -> tuple[list[Shape], set[str]]:
    """What is in the picture; drawn again until it fits, with at most five labels."""
    while True:
        layout = str(rng.choice(list(_LAYOUTS), p=list(_LAYOUTS.values())))
        if layout == "crowd":
            shapes = _crowd(rng)
        elif layout == "overlap":
            shapes = _overlapping(rng)
        else:
            number = {"single": 1, "pair": 2, "triple": 3}[layout]
            shapes = _apart(rng, _kinds(rng, number), *_RADII[layout])
        if not shapes:
            continue
        labels = {s.kind for s in shapes} | {s.colour for s in shapes} - {"neutral"}
        labels |= {layout} & {"crowd", "overlap"}
        labels |= {"striped"} if any(s.is_striped for s in shapes) else set()
        if len(labels) <= 5:
            return shapes, labels


# With their probabilities, before those that do not fit are drawn again.
_LAYOUTS = {"single": 0.2, "pair": 0.27, "triple": 0.1, "overlap": 0.25, "crowd": 0.18}
_RADII = {"single": (0.24, 0.34), "pair": (0.18, 0.23), "triple": (0.15, 0.18)}


def _kinds(rng: np.random.Generator, number: int) -> list[str]:
    while True:
        kinds = list(rng.choice(KINDS, number))
        if not {"ring", "square"} <= set(kinds):
            return kinds


def _shape(
    rng: np.random.Generator, kind: str, x: float, y: float, radius: float
) -> Shape:
    colour = rng.choice(["red", "yellow", "green", "blue", "neutral"], p=_COLOURS[kind])
    is_striped = kind in ("circle", "square") and rng.random() < 0.4
    turn = int(rng.integers(-1, 2))  # nearly upright, as things in photos are
    return Shape(kind, str(colour), x, y, radius, turn, is_striped)


# Probability of red, yellow, green, blue and neutral.
_COLOURS = {
    "circle": (0.2, 0.1, 0.1, 0.3, 0.3),
    "crescent": (0.1, 0.3, 0.0, 0.3, 0.3),
    "cross": (0.6, 0.0, 0.0, 0.0, 0.4),
    "ring": (0.2, 0.1, 0.2, 0.2, 0.3),
    "square": (0.2, 0.1, 0.1, 0.3, 0.3),
    "star": (0.0, 1.0, 0.0, 0.0, 0.0),
    "triangle": (0.1, 0.0, 0.7, 0.0, 0.2),
}


def _apart(
    rng: np.random.Generator, kinds: list[str], smallest: float, largest: float
) -> list[Shape]:
    """Shapes with a gap between them; none where a place is not found quickly."""
    shapes: list[Shape] = []
    for kind in kinds:
        for _ in range(20):
            radius = rng.uniform(smallest, largest)
            x, y = rng.uniform(radius + 0.02, 0.98 - radius, 2)
            gaps = (math.hypot(s.x - x, s.y - y) - s.radius - radius for s in shapes)
            if min(gaps, default=1.0) > 0.04:
                shapes.append(_shape(rng, kind, x, y, radius))
                break
        else:
            return []
    return shapes


def _crowd(rng: np.random.Generator) -> list[Shape]:
    kind = str(rng.choice(["circle", "square", "triangle"]))
    shapes = _apart(rng, [kind] * rng.integers(5, 8), 0.09, 0.11)
    if not shapes:
        return []
    return [replace(s, colour=shapes[0].colour, is_striped=False) for s in shapes]


def _overlapping(rng: np.random.Generator) -> list[Shape]:
    """Two shapes of which the second covers an eighth to a half of the first."""
    radii = rng.uniform(0.2, 0.26, 2)
    distance, angle = rng.uniform(0.45, 0.7) * radii.sum(), rng.uniform(0, 2 * math.pi)
    middle = rng.uniform(0.42, 0.58, 2)
    step = np.array([math.cos(angle), math.sin(angle)]) * distance / 2
    places = np.stack([middle - step, middle + step])
    if (np.minimum(places, 1 - places).min(1) < radii).any():
        return []
    below, above = (
        _shape(rng, kind, x, y, radius)
        for kind, (x, y), radius in zip(_kinds(rng, 2), places, radii, strict=True)
    )
    covers = [cover(shape, size=64) for shape in (below, above)]
    hidden = (covers[0] * covers[1]).sum() / covers[0].sum()
    return [below, above] if 0.125 < hidden < 0.5 else []
