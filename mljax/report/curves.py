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
    where a start says to forget what came later (`terminal.curves_writer`), that does
    not count, and of two numbers of one step the later one does.

    Raises:
        UserError: there is no such folder, or it has no events.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda p: p.name)
    if not files:
        raise UserError(f"{folder} holds no events of TensorBoard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, dict[int, float]] = {}
    seconds = 0.0
    for file in files:
        times = []
        for event in EventFileLoader(str(file)).Load():
            times.append(event.wall_time)
            if event.session_log.status == SessionLog.START:
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                number = make_ndarray(value.tensor)
                if number.ndim == 0 and np.issubdtype(number.dtype, np.number):
                    found.setdefault(value.tag, {})[event.step] = float(number)
        if times:  # a kill or a full disk may leave a file empty
            seconds += times[-1] - times[0]
    found = {tag: values for tag, values in found.items() if values}
    if not found:
        raise UserError(f"{folder} holds no curves: its event files are empty")
    series = {}
    for tag, values in found.items():
        steps = np.array(sorted(values))
        series[tag] = steps, np.array([values[step] for step in steps])
    return Curves(series, seconds)
