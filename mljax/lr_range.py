"""The learning-rate range test without the training: its curve and what it suggests.

Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3,
arXiv 1506.01186: train while the learning rate grows exponentially, and look where the
loss falls and where it begins to rise.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mljax import pictures
from mljax.errors import UserError

_KEPT = 0.9  # share of the running average that a new step leaves
_DIVERGED = 4.0  # times the lowest smoothed loss


def ramp(low: float, high: float, steps: int) -> np.ndarray:
    """Learning rates [steps] from `low` to `high`, each the same factor above the last.

    Raises ValueError unless 0 < low < high and there are two steps.
    """
    if not 0 < low < high or steps < 2:
        raise ValueError(f"no ramp of {steps} steps from {low} to {high}")
    return np.geomspace(low, high, steps)


@dataclass
class Curve:
    """Losses by learning rate, as a range test adds them.

    The loss is smoothed by a running average, divided by 1 - kept^n, the sum of its
    weights, because it starts at zero. Such an average is kept / (1 - kept) steps late.
    So the logarithm of the learning rate is averaged in the same way: the smoothed loss
    is that of the smoothed learning rate.
    """

    lr: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    smooth_lr: list[float] = field(default_factory=list)
    smooth_loss: list[float] = field(default_factory=list)
    _average: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def add(self, lr: float, loss: float) -> bool:
        """Takes one step; True once the loss has diverged, and then no step more."""
        if not math.isfinite(loss):
            return True
        new = np.array([math.log(lr), loss])
        self._average = _KEPT * self._average + (1 - _KEPT) * new
        log_lr, smooth = self._average / (1 - _KEPT ** (len(self.lr) + 1))
        self.lr.append(lr)
        self.loss.append(loss)
        self.smooth_lr.append(math.exp(log_lr))
        self.smooth_loss.append(float(smooth))
        return bool(smooth > _DIVERGED * min(self.smooth_loss))

    def csv(self) -> str:
        """One line a step."""
        rows = zip(self.lr, self.loss, self.smooth_lr, self.smooth_loss, strict=True)
        lines = [",".join(f"{value:.6g}" for value in row) for row in rows]
        return "\n".join(["lr,loss,smooth_lr,smooth_loss", *lines]) + "\n"


class Suggestion(NamedTuple):
    """Learning rates that a curve suggests.

    Attributes:
        steepest: where the smoothed loss falls fastest with the logarithm of the
            learning rate.
        lowest: where the smoothed loss is lowest: often already too high to train with.
    """

    steepest: float
    lowest: float


def suggest(curve: Curve) -> Suggestion:
    """What the curve suggests, of the part before the lowest smoothed loss.

    Raises:
        UserError: the loss did not fall by more than its noise.
    """
    lr, smooth = np.log(curve.smooth_lr), np.asarray(curve.smooth_loss)
    # Before `first` the average is over fewer steps than later.
    first = round(1 / (1 - _KEPT))
    lowest = int(smooth.argmin()) if len(smooth) else 0
    fell = False
    if lowest >= first + 3:
        noise = np.std((np.asarray(curve.loss) - smooth)[: lowest + 1])
        fell = smooth[first] - smooth[lowest] > noise
    if not fell:
        raise UserError(
            f"range test: in {len(lr)} steps the loss did not fall by more than its "
            "noise, so there is nothing to suggest: try another --min and --max, or "
            "more --steps"
        )
    # The slope at a point is that of a line through its neighbours; a few of them, or a
    # dip at the end, would be more noise than slope.
    near = max(1, min(len(lr) // 12, (lowest - first) // 2))
    middles = range(first + near, lowest - near + 1)
    parts = [slice(i - near, i + near + 1) for i in middles]
    slopes = [np.polyfit(lr[part], smooth[part], 1)[0] for part in parts]
    steepest = middles[int(np.argmin(slopes))]
    return Suggestion(curve.smooth_lr[steepest], curve.smooth_lr[lowest])


def draw(file: Path, curve: Curve, found: Suggestion | None, title: str) -> None:
    """Writes a PNG: the loss over the learning rate, with what was found marked."""
    # The object interface: pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    smooth = curve.smooth_lr, curve.smooth_loss
    axis.plot(curve.lr, curve.loss, color="#9cc3e6", linewidth=1, label="loss")
    axis.plot(*smooth, color="#08306b", linewidth=2, label="smoothed")
    if found:
        steepest, tenth = found.steepest, found.lowest / 10
        text = f"{steepest:.3g}  steepest: suggested"
        axis.axvline(steepest, color="#c62828", linewidth=1.5, label=text)
        text = f"{tenth:.3g}  lowest / 10"
        axis.axvline(tenth, color="#8a6d00", linestyle="--", linewidth=1.5, label=text)
    if curve.loss:
        # It is read where the loss falls; where it explodes it may leave the picture.
        bottom, top = min(curve.loss), max(curve.loss[:10])
        room = 0.08 * (top - bottom)
        axis.set_ylim(bottom - room, top + 4 * room)
    axis.set(xscale="log", xlabel="learning rate (config.optim.lr)", ylabel="loss")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", framealpha=1)
    pictures.save(figure, file)
