"""Runs `launch/local_hosts.sh`: several processes of `mljax.main` on this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from runs import ROOT, TINY, environment

# Sixteen steps of a backbone that compiles in a second; each is logged as it is done.
ARGUMENTS = [
    *TINY,
    "--config.model.backbone=tiny",
    "--config.model.dropout=0.1",
    "--config.epochs=4",
    "--config.train.checkpoint_every=3",
    "--config.hosts.heartbeat_timeout=300",  # a busy machine is not a dead one
]


class Hosts:
    """A started run; `lines` are what it has said so far, both streams."""

    def __init__(self, count: int, workdir: Path, cache: Path, *more: str, devices=1):
        # Stands for Python: runs tiny_program.py, which knows that backbone, instead
        # of `-m mljax.main`.
        python = cache.parent / "python"
        python.write_text(
            f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\nshift 2\n'
            f'exec {sys.executable} {ROOT}/tests/tiny_program.py main "$@"\n'
        )
        python.chmod(0o755)
        env = environment(cache) | {"PYTHON": str(python), "DEVICES": str(devices)}
        drawn = not any(flag.startswith("--config=") for flag in more)
        arguments = [flag for flag in ARGUMENTS if drawn or "data.num_" not in flag]
        command = ["bash", str(ROOT / "launch" / "local_hosts.sh"), str(count)]
        self.process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *arguments, *more],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, true: Callable[[], bool], timeout: float = 200) -> bool:
        """Waits; False if the run ended before."""
        deadline = time.monotonic() + timeout
        while not true():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)
        return True

    def until_said(self, words: str) -> None:
        assert self.until(lambda: words in self.text), self.text

    def pid(self, rank: int) -> int:
        """Of the process with this number."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in children.read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"--process-id" in words:
                if words[words.index(b"--process-id") + 1] == str(rank).encode():
                    return int(pid)
        raise AssertionError(f"no process {rank}\n{self.text}")

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def wait(self, timeout: float = 240) -> int:
        """The exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs after {timeout} s\n{self.text}") from None
        self._reader.join(10)
        return code


def finish(count: int, workdir: Path, cache: Path, *more: str, devices=1) -> Hosts:
    """A run to its end, which must be a good one."""
    hosts = Hosts(count, workdir, cache, *more, devices=devices)
    assert hosts.wait() == 0, hosts.text
    return hosts
