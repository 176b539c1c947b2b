"""A run that is killed and started again ends with the bits of one never killed.

Two kills here; `pytest -m slow` does ten at random moments and some inside saves.
"""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import ROOT, TINY, command, environment, last_line, run, same_results

ARGUMENTS = [
    *TINY,
    "--config.model.backbone=mobilenetv3_large_100",  # it has batch statistics
    "--config.epochs=4",
    "--config.train.checkpoint_every=3",
    "--config.sam.rho=0.05",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kill")
    done = run(folder / "whole", folder / "cache", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return folder / "whole", folder / "cache"


def start_and_kill(workdir: Path, cache: Path, when: Callable[[], bool]) -> bool:
    """Starts the run and sends SIGKILL once `when()`; False if it ended before."""
    process = subprocess.Popen(
        command(workdir, *ARGUMENTS),
        cwd=ROOT,
        env=environment(cache),
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


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    folders = (workdir / "checkpoints", workdir / "best")
    return any("tmp" in p.name for f in folders if f.is_dir() for p in f.iterdir())


def saved(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    return [p.name for p in folder.glob("[0-9]*") if p.name.isdigit()]


def finish(workdir: Path, cache: Path) -> None:
    done = run(workdir, cache, *ARGUMENTS)
    assert done.returncode == 0, last_line(done.stderr)


def test_killed_between_and_inside_saves(undisturbed, tmp_path):
    whole, cache = undisturbed
    workdir = tmp_path / "run"
    assert start_and_kill(workdir, cache, lambda: bool(saved(workdir)))
    first = saved(workdir)
    assert start_and_kill(
        workdir, cache, lambda: saved(workdir) != first and saving(workdir)
    )
    finish(workdir, cache)
    same_results(whole, workdir)


def test_a_finished_run_says_so_and_changes_nothing(undisturbed):
    whole, cache = undisturbed
    before = {p: p.read_bytes() for p in whole.glob("metrics.*")}
    again = run(whole, cache, *ARGUMENTS)
    assert again.returncode == 0 and "resumed at step 16" in again.stdout
    assert before == {p: p.read_bytes() for p in whole.glob("metrics.*")}


@pytest.mark.slow
def test_ten_kills_at_random_moments(undisturbed, tmp_path):
    whole, cache = undisturbed
    workdir = tmp_path / "run"
    draw = random.Random(0)
    begun = time.monotonic()
    finish(tmp_path / "timing", cache)
    longest = time.monotonic() - begun
    kills = 0
    while kills < 10:
        at = time.monotonic() + draw.uniform(0, longest)
        kills += start_and_kill(workdir, cache, lambda at=at: time.monotonic() > at)
        if (workdir / "predictions.png").exists():  # it finished: begin another run
            same_results(whole, workdir)
            workdir = tmp_path / f"run{kills}"
    finish(workdir, cache)
    same_results(whole, workdir)


@pytest.mark.slow
def test_five_kills_inside_saves(undisturbed, tmp_path):
    whole, cache = undisturbed
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

        start_and_kill(workdir, cache, inside)
        finish(workdir, cache)
        same_results(whole, workdir)
