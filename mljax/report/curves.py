"""The curves that training wrote for TensorBoard."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mljax.errors import UserError


class Curves(NamedTuple):
    """Attributes:
    values: by tag ("train/loss"): steps and numbers, both [n], by step.
    seconds: how long the run was at work, without the pauses between its starts.
    """

    values: dict[str, tuple[np.ndarray, np.ndarray]]
    seconds: float | None


def read_curves(folder: Path) -> Curves:
    """All scalars of a TensorBoard folder.

    A run that was stopped wrote a file at each start, and computed some steps again:
    the later numbers count.

    Raises:
        UserError: there is no such folder, or it has no events.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda p: p.name)
    if not files:
        raise UserError(f"{folder} holds no events of TensorBoard")
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    seconds = 0.0
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"tensors": 0}).Reload()
        try:
            last = first = events.FirstEventTimestamp()
        except ValueError:  # a kill or a full disk has left it empty
            continue
        for tag in events.Tags()["tensors"]:
            points = events.Tensors(tag)
            values = found.setdefault(tag, {})
            for point in points:
                number = tf.make_ndarray(point.tensor_proto)
                if number.ndim == 0:
                    values[point.step] = float(number)
            last = max(last, points[-1].wall_time)
        seconds += last - first
    if not found:
        raise UserError(f"{folder} holds no curves: its event files are empty")
    series = {}
    for tag, values in found.items():
        steps = np.array(sorted(values))
        series[tag] = steps, np.array([values[step] for step in steps])
    return Curves(series, seconds)
