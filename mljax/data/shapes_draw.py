"""Drawing for the embedded data set: backgrounds, shapes and disturbances."""

import functools
import math
from dataclasses import dataclass

import numpy as np

KINDS = ("circle", "crescent", "cross", "ring", "square", "star", "triangle")
# Hues as shares of the full circle.
HUES = {"red": 0.0, "yellow": 0.145, "green": 0.35, "blue": 0.62}


@dataclass(frozen=True)
class Shape:
    """One object; lengths are shares of the side of the picture."""

    kind: str
    colour: str  # one of HUES or "neutral"
    x: float
    y: float
    radius: float
    turn: int  # in steps of 15 degrees
    is_striped: bool


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A muted gradient with blotches, strokes and specks, float32 [size, size, 3]."""
    x, y = _grid(size)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (x * math.cos(angle) + y * math.sin(angle))[:, :, None]
    base = rng.uniform(0.3, 0.75) + rng.uniform(-0.15, 0.15, 3).astype(np.float32)
    image = base + ramp * rng.uniform(-0.3, 0.3, 3).astype(np.float32)
    cells = int(rng.integers(3, 9))
    image += _enlarge(rng.normal(0, rng.uniform(0.02, 0.09), (cells, cells, 3)), size)
    for _ in range(rng.integers(2, 6)):
        _stroke(rng, image)
    return image


@functools.cache
def _grid(size: int) -> np.ndarray:
    """x and y of each pixel, 0 in the middle: float32 [2, size, size]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    return np.stack([x, y])


@functools.cache
def _blend(cells: int, size: int) -> np.ndarray:
    """float32 [size, cells]: weights of linear interpolation."""
    at = np.linspace(0, cells - 1, size)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells)))
    return weights.astype(np.float32)


def _enlarge(grid: np.ndarray, size: int) -> np.ndarray:
    """[n, n, 3] -> float32 [size, size, 3], bilinear."""
    weights = _blend(len(grid), size)
    rows = (weights @ grid.reshape(len(grid), -1).astype(np.float32)).reshape(
        size, len(grid), 3
    )
    return weights @ rows


def _stroke(rng: np.random.Generator, image: np.ndarray) -> None:
    """A thin line, straight or bent, of any colour; or a speck where it is short."""
    size = len(image)
    # Plain floats: a float64 of NumPy would turn the whole computation to float64.
    x0, y0, angle, bend, opacity = rng.uniform(size=5).tolist()
    length, width = float(rng.choice([0.02, 0.2, 0.4])), rng.uniform(0.4, 0.9)
    sin, cos = math.sin(2 * math.pi * angle), math.cos(2 * math.pi * angle)
    # Only the part of the picture that the line can reach.
    reach = math.hypot(length, 1.5 * length**2) + 2 / size
    window = tuple(
        slice(max(int((c - reach) * size), 0), int((c + reach) * size) + 1)
        for c in (y0, x0)
    )
    x, y = _grid(size)[:, *window]
    x, y = x - (x0 - 0.5), y - (y0 - 0.5)
    along = x * cos + y * sin
    across = y * cos - x * sin + (3 * bend - 1.5) * along**2
    distance = np.maximum(np.abs(along) - length, np.abs(across)) * size
    where = np.nonzero(distance < width + 0.5)
    alpha = np.minimum(width + 0.5 - distance[where], 1) * (0.5 + 0.5 * opacity)
    colour = _rgb(*rng.uniform(size=3).tolist())
    view = image[window]
    view[where] += alpha[:, None] * (colour - view[where])


def disturb(rng: np.random.Generator, image: np.ndarray) -> None:
    """Uneven light, a colour cast and grain, over everything; in place."""
    light = rng.uniform(0.75, 1.15, (2, 2, 1)) * rng.uniform(0.93, 1.07, 3)
    image *= _enlarge(light, len(image))
    grain = rng.standard_normal(image.shape, np.float32)
    image += rng.uniform(0.01, 0.04) * grain


def draw(rng: np.random.Generator, image: np.ndarray, shape: Shape) -> None:
    """Paints a shape over the image, with a rim that sets it off; in place."""
    size = len(image)
    cover, inside, stripes = _masks(*_mask_key(shape, size))
    view = image[_window(shape, size)]
    if shape.colour == "neutral":  # white on dark, black on light
        is_dark = view.mean() < 0.5
        colour = np.full(
            3, rng.uniform(0.85, 1) if is_dark else rng.uniform(0.05, 0.15), np.float32
        )
        rim = 1 - colour
    else:
        hue = HUES[shape.colour] + rng.uniform(-0.02, 0.02)
        colour = _rgb(hue, rng.uniform(0.8, 1), rng.uniform(0.8, 1))
        rim = colour * 0.45
    paint = rim + inside[:, :, None] * (colour - rim)
    if shape.is_striped:
        stripe = 0.95 if colour.mean() < 0.6 else 0.1
        paint += (inside * stripes)[:, :, None] * (stripe - paint)
    view += cover[:, :, None] * (paint - view)


def cover(shape: Shape, size: int) -> np.ndarray:
    """How much of each pixel a shape covers, in [0, 1]: [size, size]."""
    covered = np.zeros((size, size), np.float32)
    covered[_window(shape, size)] = _masks(*_mask_key(shape, size))[0]
    return covered


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV in [0, 1] -> RGB, float32 [3]."""
    channels = (
        value * (1 - saturation * (1 - min(max(abs((hue * 6 + k) % 6 - 3) - 1, 0), 1)))
        for k in (0, 4, 2)
    )
    return np.array(tuple(channels), np.float32)


def _mask_key(shape: Shape, size: int) -> tuple[str, int, int]:
    return shape.kind, max(2, round(shape.radius * size)), shape.turn


def _window(shape: Shape, size: int) -> tuple[slice, slice]:
    """Where in the picture the masks of a shape lie."""
    radius = _mask_key(shape, size)[1]
    top, left = (
        min(max(round(c * size) - radius, 0), size - 2 * radius)
        for c in (shape.y, shape.x)
    )
    return slice(top, top + 2 * radius), slice(left, left + 2 * radius)


@functools.cache
def _masks(kind: str, radius: int, turn: int) -> np.ndarray:
    """The shape, the shape less its rim, and stripes: [3, 2 * radius, 2 * radius].

    Values in [0, 1]; `radius` in pixels, `turn` in steps of 15 degrees.
    """
    angle = turn * math.pi / 12
    grid = (np.arange(2 * radius) + 0.5 - radius) / radius
    x, y = np.meshgrid(grid, grid)
    x, y = (
        x * math.cos(angle) + y * math.sin(angle),
        y * math.cos(angle) - x * math.sin(angle),
    )
    depth = _depth(kind, x, y) * radius  # pixels
    rim = max(1.0, 0.07 * radius)
    stripes = np.clip(0.5 + 3 * np.sin(y * 3 * math.pi), 0, 1)
    masks = np.clip(depth, 0, 1), np.clip(depth - rim, 0, 1), stripes
    return np.stack(masks).astype(np.float32)


def _depth(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How deep each point lies inside a shape of radius 1; negative outside."""
    r = np.hypot(x, y)
    match kind:
        case "circle":
            return 0.95 - r
        case "ring":
            return 0.2 - np.abs(r - 0.78)
        case "crescent":
            return np.minimum(1 - r, np.hypot(x - 0.55, y) - 0.8)
        case "square":
            return 0.78 - np.maximum(np.abs(x), np.abs(y))
        case "cross":
            arm = np.minimum(np.abs(x), np.abs(y))
            return np.minimum(0.27 - arm, 0.92 - np.maximum(np.abs(x), np.abs(y)))
    # A triangle and a five-pointed star: straight edges, the same after each turn.
    points = 3 if kind == "triangle" else 5
    inner = 0.5 if kind == "triangle" else 0.42  # radius half-way between two points
    sector = math.pi / points
    theta = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    px, py = r * np.cos(theta), r * np.sin(theta)
    # Distance to the edge from the point (1, 0) to the corner at angle `sector`.
    ex, ey = inner * math.cos(sector) - 1, inner * math.sin(sector)
    return (ey * (1 - px) + ex * py) / math.hypot(ex, ey)
