"""Stopping when asked: the step in progress is finished and saved by all processes.

SIGTERM is what a cluster sends before it takes a machine away. With several processes
JAX's preemption service passes it on, whichever of them it reached, and all agree on
the step after which they stop. Ctrl-C (SIGINT) does the same once; the second one
ends the program at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from mljax.errors import RESTART, Stopped, complain

INTERRUPTED = 130  # by the person at the keyboard: nothing to be restarted


class Watch:
    """Whether somebody asked this run, or another process of it, to stop."""

    def __init__(self) -> None:
        self.many = jax.process_count() > 1
        self.received: list[int] = []

    def asked(self, step: int) -> bool:
        """True once all processes are to save and stop; ask after every step."""
        if self.many:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return bool(self.received)

    def asked_until(self, step: int) -> bool:
        """`asked`, before the first step of a run that goes on from `step`.

        The processes agree on one of the numbers that they ask for, and begin at 1.
        """
        return any(self.asked(at) for at in range(1, step + 1))

    def stops(self, step: int, saved: Callable[[], None]) -> Callable[[], None]:
        """For a long evaluation after `step`: raises `stopped` once this run is asked
        to stop, and `saved` has returned. Does nothing with several processes, which
        agree after steps only."""

        def check() -> None:
            if self.received and not self.many:
                saved()
                raise self.stopped(step)

        return check

    def stopped(self, step: int) -> Stopped:
        """What to raise once `step` is saved."""
        by_keyboard = not self.many and signal.SIGINT in self.received
        return Stopped(
            f"stopped and saved at step {step}: the same command goes on from here",
            INTERRUPTED if by_keyboard else RESTART,
        )


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Takes SIGINT and SIGTERM while it lasts."""
    watch = Watch()
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        watch.received.append(number)
        if number != signal.SIGINT:
            return
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if watch.many:  # JAX takes SIGTERM, and tells the others
            os.kill(os.getpid(), signal.SIGTERM)
        complain("\nstopping: the step in progress is saved (Ctrl-C again: at once)")

    # With several processes SIGTERM is JAX's, from the start.
    numbers = (signal.SIGINT,) if watch.many else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
