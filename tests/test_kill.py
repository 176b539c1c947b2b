"""A run that is killed and started again ends with the bits of one never killed.

Two kills here; `pytest -m slow` does ten at random moments and some inside saves.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import BACKBONE, ROOT, TINY, environment, last_line, same_results

ARGUMENTS = [
    *(flag for flag in TINY if flag != BACKBONE),
    "--config.epochs=4",
    "--config.train.checkpoint_every=3",
    "--config.sam.rho=0.05",
]


class Job(NamedTuple):
    """A program with its arguments, the result of a run never killed, and the cache."""

    program: list[str]
    whole: Path
    cache: Path

    def command(self, workdir: Path) -> list[str]:
        return [sys.executable, *self.program, *ARGUMENTS, f"--workdir={workdir}"]

    def finish(self, workdir: Path) -> str:
        done = subprocess.run(
            self.command(workdir),
            cwd=ROOT,
            env=environment(self.cache),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, last_line(done.stderr)
        return done.stdout

    def start_and_kill(self, workdir: Path, when: Callable[[], bool]) -> bool:
        """Starts the run, SIGKILL once `when()`; False if it ended before."""
        process = subprocess.Popen(
            self.command(workdir),
            cwd=ROOT,
            env=environment(self.cache),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if when():
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.0005)
        process.kill()
        process.wait()
        return False


def undisturbed(folder: Path, *program: str) -> Job:
    job = Job(list(program), folder / "whole", folder / "cache")
    job.finish(job.whole)
    return job


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Job:
    """With a network that compiles in a second, and has batch statistics."""
    tiny = ("tests/tiny_program.py", "main", "--config.model.backbone=tiny")
    return undisturbed(tmp_path_factory.mktemp("tiny"), *tiny)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Job:
    real = ("-m", "mljax.main", "--config.model.backbone=mobilenetv3_large_100")
    return undisturbed(tmp_path_factory.mktemp("real"), *real)


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    folders = (workdir / "checkpoints", workdir / "best")
    return any("tmp" in p.name for f in folders if f.is_dir() for p in f.iterdir())


def saved(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    return [p.name for p in folder.glob("[0-9]*") if p.name.isdigit()]


def test_killed_between_and_inside_saves(tiny, tmp_path):
    workdir = tmp_path / "run"
    assert tiny.start_and_kill(workdir, lambda: bool(saved(workdir)))
    first = saved(workdir)
    assert tiny.start_and_kill(
        workdir, lambda: saved(workdir) != first and saving(workdir)
    )
    tiny.finish(workdir)
    same_results(tiny.whole, workdir)


def test_a_finished_run_says_so_and_changes_nothing(tiny):
    before = {p: p.read_bytes() for p in tiny.whole.glob("metrics.*")}
    assert "resumed at step 16" in tiny.finish(tiny.whole)
    assert before == {p: p.read_bytes() for p in tiny.whole.glob("metrics.*")}


@pytest.mark.slow
def test_ten_kills_at_random_moments(real, tmp_path):
    workdir = tmp_path / "run"
    draw = random.Random(0)
    begun = time.monotonic()
    real.finish(tmp_path / "timing")
    longest = time.monotonic() - begun
    kills = 0
    while kills < 10:
        at = time.monotonic() + draw.uniform(0, longest)
        kills += real.start_and_kill(workdir, lambda at=at: time.monotonic() > at)
        if (workdir / "predictions.png").exists():  # it finished: begin another run
            same_results(real.whole, workdir)
            workdir = tmp_path / f"run{kills}"
    real.finish(workdir)
    same_results(real.whole, workdir)


@pytest.mark.slow
def test_five_kills_inside_saves(real, tmp_path):
    for kill in range(5):
        workdir = tmp_path / f"run{kill}"
        draw = random.Random(kill)
        wait = {"until": 0.0}

        def inside(workdir=workdir, draw=draw, wait=wait) -> bool:
            if not saving(workdir):
                wait["until"] = 0.0
                return False
            # Not always at the first moment of the save.
            wait["until"] = wait["until"] or time.monotonic() + draw.uniform(0, 0.1)
            return time.monotonic() >= wait["until"]

        assert real.start_and_kill(workdir, inside)
        real.finish(workdir)
        same_results(real.whole, workdir)
