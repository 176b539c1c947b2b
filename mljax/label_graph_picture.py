"""The label graph as a picture: labels on a circle, an arrow for each edge."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mljax import pictures
from mljax.label_text import all_scripts, shorten, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Colour = str | tuple[float, float, float, float]

_MOST_LABELS = 100  # of more, those without an edge are left out
_MOST_EDGES = 400  # of more, the strongest are drawn
_MOST_LETTERS = 32  # of a name
_LETTER = 0.58  # its width over the size of the font
_SIDE = 11 * 0.96  # inches, of the place for the circle (radius 1) and the names
_REACH = 1.42, 1.9  # from its centre to the edges; the second for long names


def draw(
    file: Path, class_names: Sequence[str], cooccurrence: np.ndarray, tau: float
) -> None:
    """Writes a PNG of `figure`."""
    # The object interface: pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with all_scripts():
        made = figure(class_names, cooccurrence, tau)
        FigureCanvasAgg(made)
        pictures.save(made, file)


def figure(
    class_names: Sequence[str],
    cooccurrence: np.ndarray,
    tau: float,
    *,
    ink: str = "#111111",
    faint: str = "#999999",
    weak_and_strong: tuple[Colour, Colour] = ("#9cc3e6", "#08306b"),
    scale: bool = True,
) -> "Figure":
    """Labels that go together stand together; isolated ones are `faint`.

    Args:
        class_names: of the rows and columns.
        cooccurrence: [num_classes, num_classes], P(j | i) in row i.
        tau: pairs from this probability on are edges.
        ink, faint, weak_and_strong: colours, of matplotlib.
        scale: also draw which colour is which probability.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    edges = cooccurrence >= tau
    count, alone = edges.sum(), (~(edges.any(0) | edges.any(1))).sum()
    text = f"{len(edges)} labels, {count} edges, {alone} labels without any\n"
    text += f"i -> j: of the images with i, at least {tau:g} have j\n"
    if count > _MOST_EDGES:
        edges &= cooccurrence >= np.sort(cooccurrence[edges])[-_MOST_EDGES]
        text += f"the {edges.sum()} strongest edges are shown; "
    linked = np.logical_or(edges.any(0), edges.any(1))
    shown = around_the_circle(edges)
    if len(shown) > _MOST_LABELS:
        shown = [i for i in shown if linked[i]]
        text += f"labels without an edge here are left out ({len(shown)} are shown)"
    angles = 2 * np.pi * np.arange(len(shown)) / max(1, len(shown))
    at = dict(zip(shown, np.stack([np.cos(angles), np.sin(angles)], 1), strict=True))

    made = Figure(figsize=(11, 11.6), dpi=100)
    axis = made.add_axes((0.02, 0.0, 0.96, 0.91))
    axis.set_axis_off()
    axis.set_aspect("equal")
    names = [shorten(name, _MOST_LETTERS) for name in class_names]
    longest = max((width(names[i]) for i in shown), default=1)
    size = float(np.clip(900 / max(1, len(shown)), 6, 13))
    # The names lie between 1.03 and `reach`.
    share = _LETTER * longest * size / (72 * _SIDE / 2)
    reach = float(np.clip(1.03 / max(1e-3, 1 - share), *_REACH))
    size = min(size, (1 - 1.03 / reach) * (72 * _SIDE / 2) / (_LETTER * longest))
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach))
    colours = LinearSegmentedColormap.from_list("edges", weak_and_strong)
    strength = ScalarMappable(Normalize(min(tau, 0.99), 1), colours)
    for i, j in sorted(np.argwhere(edges), key=lambda e: cooccurrence[tuple(e)]):
        # Through a point nearer the centre: arrows between neighbours stay short, and
        # those of the two directions do not fall on each other.
        across = at[j] - at[i]
        depth = 0.44 - 0.11 * np.hypot(*across)
        middle = depth * (at[i] + at[j]) + across[::-1] * (-0.07, 0.07)
        curve = Curve(
            [at[i], middle, at[j]], [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3]
        )
        axis.add_patch(
            FancyArrowPatch(
                path=curve,
                arrowstyle="-|>",
                mutation_scale=11,
                shrinkB=4,
                color=strength.to_rgba(cooccurrence[i, j]),
                linewidth=1.3,
            )
        )
    for i, angle in zip(shown, angles, strict=True):
        colour = ink if linked[i] else faint
        axis.plot(*at[i], "o", color=colour, markersize=size / 3)
        x, y = 1.03 * at[i]
        axis.text(
            x,
            y,
            names[i],
            color=colour,
            fontsize=size,
            rotation=np.degrees(angle) + (180 if x < 0 else 0),
            rotation_mode="anchor",
            ha="right" if x < 0 else "left",
            va="center",
            parse_math=False,  # a name with a dollar is no formula
        )
    made.text(0.02, 0.985, text, fontsize=12, va="top", color=ink)
    if scale:
        bar = made.add_axes((0.72, 0.965, 0.25, 0.012))
        made.colorbar(strength, cax=bar, orientation="horizontal")
        bar.set_xlabel("P(j | i)", fontsize=9)
    return made


def around_the_circle(edges: np.ndarray) -> list[int]:
    """All labels, each followed by its neighbours; the largest groups come first.

    Args:
        edges: bool [num_classes, num_classes].
    """
    linked = edges | edges.T
    groups, seen = [], set()
    for start in np.argsort(-linked.sum(1), kind="stable"):
        group, waiting = [], [int(start)]
        while waiting:
            label = waiting.pop()
            if label in seen:
                continue
            seen.add(label)
            group.append(label)
            waiting += [int(i) for i in np.flatnonzero(linked[label])]
        groups.append(group)
    return [label for group in sorted(groups, key=len, reverse=True) for label in group]
