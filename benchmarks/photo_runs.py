"""Trainings of configs/corel5k.py with other settings, for comparisons of them."""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """What a training gave."""

    workdir: Path
    rate: float  # images/s, evaluation apart; 0 where it was finished before
    score: float  # mAP of the best epoch
    best_epoch: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `train` reads."""
    add = parser.add_argument
    add("--root", required=True, help="folder with train.json and val.json")
    add("--weights", required=True, help="timm's tf_mobilenetv3_large_minimal_100")
    add("--workdirs", required=True, type=Path, help="a work directory each goes here")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2))
    add("--variant", default="", help="of configs/corel5k.py, such as plain")


def train(
    args: argparse.Namespace, name: str, seed: int, flags: Iterable[str] = ()
) -> Run:
    """A run in args.workdirs/name, begun or resumed; a finished one trains no more.

    SIGTERM and Ctrl-C end the run too: it saves where it is, and the next call
    resumes it.
    """
    workdir = args.workdirs / name
    rates = []
    command = [
        sys.executable,
        "-m",
        "mljax.main",
        f"--config={ROOT / 'configs' / 'corel5k.py'}:{args.variant}",
        f"--workdir={workdir}",
        f"--config.data.root={args.root}",
        f"--config.init_from={args.weights}",
        f"--config.seed={seed}",
        *flags,
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        for line in process.stdout:
            print(f"{name}: {line}", end="", flush=True)
            if line.startswith("step ") and " images/s" in line:
                rates.append(float(line.split(" images/s")[0].split()[-1]))
        signal.signal(signal.SIGTERM, before)
    if process.returncode:
        raise SystemExit(f"{name}: training did not end; its message is above")
    best = json.loads((workdir / "metrics.json").read_text())["best"]
    rate = statistics.median(rates) if rates else 0.0
    return Run(workdir, rate, best["mAP"], best["epoch"])
