"""Two programs in turns: what every benchmark beside a peer shares.

Each contestant is a process that stays alive, a `Worker`: it says what it is, then runs
what it is asked for while the others wait. Needs nothing but Python, so that the peers,
in environments of their own, import it too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# How far outputs may lie apart, relative to the largest.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
# Thread pools go on spinning for a while after their work (OpenMP for 0.2 s).
PAUSE = 0.4


def flags(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """These of `args`, as they are given to another program."""
    found = []
    for name in names:
        value = getattr(args, name)
        words = value if isinstance(value, list | tuple) else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, words)]
    return found


def as_trained(restart: bool = True) -> None:
    """To be called first by a worker of ours: this checkout's mljax, and memory set up
    as `python -m mljax.main` does (`restart`: the program starts anew for it)."""
    sys.path.insert(0, str(ROOT))
    from mljax import memory

    if restart:
        memory.restart_tuned()
    from mljax import backend

    backend.compute_inline()


class Worker:
    """A process that says what it is, and then its times whenever it is asked.

    Attributes:
        about: what it said, a dict; "variants" lists what it can be asked for.
    """

    def __init__(self, command: list[str], **environment: str):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print as well
                return json.loads(line)
        raise SystemExit("a worker ended; its message is above")

    def ask(self, variant: str, steps: int = 1, warm: int = 0) -> dict[str, Any]:
        """{"ms": of each step, "values": what each gave}; `warm` more are not timed."""
        assert self.process.stdin
        asked = {"variant": variant, "steps": steps, "warm": warm}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def our_allocator() -> dict[str, str]:
    """The environment with which mljax restarts itself: huge pages, memory that is kept
    between steps. Empty where it does not."""
    sys.path.insert(0, str(ROOT))
    from mljax import memory

    return memory.tunables()


def answer(about: dict[str, Any], runs: Mapping[str, Callable[[], Any]]) -> None:
    """A worker's side: says `about`, then runs what it is asked for until it ends.

    runs: variant -> one step of it, which returns once it is computed. What it returns
        is given back too if it is a dict.
    """
    print(json.dumps({**about, "variants": list(runs)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(perform(runs, **json.loads(line))), flush=True)


def perform(
    runs: Mapping[str, Callable[[], Any]], variant: str, steps: int, warm: int
) -> dict[str, Any]:
    """The answer to `Worker.ask`."""
    run, ms, values = runs[variant], [], []
    for _ in range(warm):
        run()
    for _ in range(steps):
        begun = time.perf_counter()
        value = run()
        ms.append(1e3 * (time.perf_counter() - begun))
        values.append(value if isinstance(value, dict) else None)
    return {"ms": ms, "values": values}


def in_turns(
    workers: Mapping[str, Worker],
    rounds: int,
    steps: int,
    warm: int = 0,
    ending: str = "",
) -> dict[str, list[float]]:
    """Milliseconds of every step of every variant, by "WORKER VARIANT".

    ending: only the variants whose names end so.
    """
    runs = [
        (worker, variant)
        for worker in workers
        for variant in workers[worker].about["variants"]
        if variant.endswith(ending)
    ]
    times: dict[str, list[float]] = {f"{w} {v}".strip(): [] for w, v in runs}
    for _ in range(rounds):
        for name, variant in runs:
            time.sleep(PAUSE)
            found = workers[name].ask(variant, steps, warm)
            times[f"{name} {variant}".strip()] += found["ms"]
    return times


def summary(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """The median and the least of each, for the JSON file."""
    return {
        "median_ms": {name: statistics.median(ms) for name, ms in times.items()},
        "least_ms": {name: min(ms) for name, ms in times.items()},
    }


def fastest(medians: Mapping[str, float], beginning: str) -> float | None:
    """The least of those whose names begin so; None if there is none."""
    return min((v for k, v in medians.items() if k.startswith(beginning)), default=None)


def same(what: str, one: Any, other: Any, tolerance: float) -> float:
    """The largest relative difference of two numbers or lists of numbers.

    Ends the program if it is above `tolerance`: different things are not timed.
    """
    one, other = ([x] if isinstance(x, float) else x for x in (one, other))
    largest = max(abs(x) for x in other)
    off = [abs(x - y) / largest for x, y in zip(one, other, strict=True)]
    if not all(x <= tolerance for x in off):  # nor NaN
        shown = f"{one[:3]} and {other[:3]}"
        raise SystemExit(f"{what} differ by {max(off):.1e} of the largest: {shown}")
    return max(off)


def machine() -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
    }


def save(file: str | None, result: Mapping[str, Any]) -> None:
    """Writes `result` and the machine as JSON, if there is a file to write."""
    if file:
        Path(file).write_text(json.dumps({**result, **machine()}, indent=2) + "\n")
