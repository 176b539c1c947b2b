"""Two and four processes on this machine, and what becomes of them when one ends."""

import contextlib
import json
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from host_runs import Hosts, finish
from runs import TINY, load, run, same_results

from mljax import hosts, preemption
from mljax.errors import UserError

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds processes through /proc"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, Path]:
    """The work directory of two processes that nobody disturbed, and the cache."""
    folder = tmp_path_factory.mktemp("hosts")
    done = finish(2, folder / "whole", folder / "cache")
    assert "[0] hosts:   process 0 " in done.text
    assert "[1] step" not in done.text  # one process speaks
    return folder / "whole", folder / "cache"


def test_sigterm_to_one_saves_on_all_and_the_bits_stay(undisturbed, tmp_path):
    whole, cache = undisturbed
    first = Hosts(2, tmp_path / "run", cache)
    first.until_said("] step 4/16")
    first.signal(1, signal.SIGTERM)
    assert first.wait() == 75, first.text
    saved = [line for line in first.lines if "stopped and saved at step" in line]
    assert len(saved) == 2 and saved[0][4:] == saved[1][4:], first.text
    step = saved[0].split("step ")[1].split(":")[0]
    assert (tmp_path / "run" / "checkpoints" / step).is_dir()
    again = finish(2, tmp_path / "run", cache)
    assert f"resumed at step {step}" in again.text
    same_results(whole, tmp_path / "run")


def test_an_error_of_one_ends_all_with_its_message(undisturbed, tmp_path):
    _, cache = undisturbed
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("not a run")  # only process 0 looks
    begun = Hosts(2, tmp_path / "run", cache)
    assert begun.wait(100) == 1, begun.text
    for rank in (0, 1):
        said = [x for x in begun.lines if x.startswith(f"[{rank}] error: ")]
        assert len(said) == 1 and "is not empty and holds no mljax run" in said[0]
    assert "process 0 on " in next(x for x in begun.lines if x.startswith("[1] error"))
    assert "Traceback" not in begun.text
    assert (tmp_path / "run" / "mine.txt").read_text() == "not a run"


def test_one_that_dies_before_they_have_met(tmp_path, monkeypatch):
    """The other waits for it, until the launcher ends it."""
    monkeypatch.setenv("GRACE", "2")
    started = Hosts(2, tmp_path / "run", tmp_path / "cache")

    def exists() -> bool:
        with contextlib.suppress(AssertionError, OSError):
            return bool(started.pid(1))
        return False

    assert started.until(exists), started.text
    started.signal(1, signal.SIGKILL)
    assert started.wait(60) == 137, started.text
    assert "process 1 ended with exit code 137" in started.text
    assert "still running 2 s after one failed: killed" in started.text
    assert "process 0 ended with exit code 137" in started.text


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_never_comes(tmp_path, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    flags = ["--coordinator", address, "--num-processes=2", f"--process-id={rank}"]
    flags += [*TINY, "--config.hosts.start_timeout=3"]
    done = run(tmp_path / "run", tmp_path, *flags)
    assert done.returncode == 75  # launchers start again
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: no connection of all processes at {address} within")


def test_data_that_is_not_the_same_everywhere(monkeypatch):
    hosts.check_same("config.data.root", "images or labels", {"train images": "a"})
    found = [["a", "one"], ["b", "two"], ["a", "three"]]
    monkeypatch.setattr(hosts, "gather", lambda value: found)
    words = (
        r"data\.root: process 1 \(two\) has other images or labels than process 0 \(one"
    )
    with pytest.raises(UserError, match=words):
        hosts.check_same("config.data.root", "images or labels", "a")


def test_alone_nothing_is_gathered():
    assert hosts.gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert hosts.of_first("x") == "x"


def losses(workdir: Path) -> list[float]:
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def close(one: Path, other: Path) -> None:
    """The same run but for the order of sums."""
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-4)
    trees = [load(w / "checkpoints" / "16") for w in (one, other)]
    for name, value in trees[0]["params"]["head"].items():
        for leaf in value:
            np.testing.assert_allclose(
                value[leaf], trees[1]["params"]["head"][name][leaf], atol=1e-3
            )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigkill_to_one_ends_the_other_and_a_restart_finishes(
    undisturbed, tmp_path, rank
):
    whole, cache = undisturbed
    first = Hosts(2, tmp_path / "run", cache, "--config.hosts.heartbeat_timeout=10")
    first.until_said("] step 5/16")
    first.signal(rank, signal.SIGKILL)
    begun = time.monotonic()
    assert first.wait(60) not in (0, 1, 75), first.text
    print(f"rank {rank} killed, the other ended after {time.monotonic() - begun:.0f} s")
    assert f"process {rank} ended with exit code 137" in first.text
    finish(2, tmp_path / "run", cache)
    same_results(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_the_number_of_processes_may_change(undisturbed, tmp_path, count):
    whole, cache = undisturbed
    first = Hosts(2, tmp_path / "run", cache)
    first.until_said("] step 6/16")
    first.signal(0, signal.SIGTERM)
    assert first.wait() == 75, first.text
    again = finish(count, tmp_path / "run", cache)
    assert "resumed at step" in again.text
    close(whole, tmp_path / "run")
    found = []
    for processes in (1, count):
        finish(processes, tmp_path / "run", cache, "--mode=eval")
        report = json.loads((tmp_path / "run" / "eval.json").read_text())
        assert report.pop("unreadable") == []
        found.append(report | report.pop("per_class"))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 16])
def test_the_number_of_devices_may_change(undisturbed, tmp_path, devices):
    whole, cache = undisturbed
    more = "--config.eval.batch_size=32"
    first = Hosts(1, tmp_path / "run", cache, more, "--config.mesh.fsdp=4", devices=8)
    first.until_said("] step 6/16")
    first.signal(0, signal.SIGTERM)
    assert first.wait() == 75, first.text
    again = finish(1, tmp_path / "run", cache, more, devices=devices)
    assert "resumed at step" in again.text
    close(whole, tmp_path / "run")


@pytest.mark.slow
def test_four_processes_and_an_image_that_one_of_them_cannot_read(tmp_path):
    from test_end_to_end import dataset

    data = dataset(tmp_path / "data", count=24)
    broken = data / "photos" / "train 3 é.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    more = [
        "--config=configs/coco.py:debug",
        "--config.batch_size=8",
        "--config.data.image_size=32",
        f"--config.data.root={data}",
    ]
    stop = Hosts(4, tmp_path / "stop", tmp_path / "cache", *more)
    assert stop.wait(200) == 1, stop.text
    for rank in range(4):
        said = [x for x in stop.lines if x.startswith(f"[{rank}] error: ")]
        assert len(said) == 1 and "train 3 é.jpg: cannot be read" in said[0]
    done = finish(
        4, tmp_path / "skip", tmp_path / "cache", *more, "--config.data.on_error=skip"
    )
    assert (tmp_path / "skip" / "unreadable.txt").read_text() == f"{broken}\n"
    assert "could not be read" in done.text


@pytest.mark.slow
def test_fifty_random_kills(undisturbed, tmp_path, monkeypatch):
    """Of one or the other of two processes, at any moment; a run after the other."""
    _, cache = undisturbed
    monkeypatch.setenv("GRACE", "20")
    draw = random.Random(0)
    whole, quick = tmp_path / "whole", "--config.hosts.heartbeat_timeout=10"
    begun = time.monotonic()
    finish(2, whole, cache, quick)
    longest = time.monotonic() - begun
    kills = finished = 0
    workdir = tmp_path / "run0"
    while kills < 50:
        hosts = Hosts(2, workdir, cache, quick)
        at = time.monotonic() + draw.uniform(0, 1.2 * longest)
        if hosts.until(lambda at=at: time.monotonic() > at):
            try:
                hosts.signal(draw.randrange(2), signal.SIGKILL)
            except (AssertionError, OSError):  # not yet started, or just ended
                hosts.wait()
                continue
            kills += 1
            code = hosts.wait()
            assert code not in (1, 75), hosts.text
        else:
            code = hosts.wait()
            assert code == 0, hosts.text
        if code == 0:
            same_results(whole, workdir)
            finished += 1
            shutil.rmtree(workdir)
            workdir = tmp_path / f"run{kills}"
    finish(2, workdir, cache, quick)
    same_results(whole, workdir)
    print(f"{kills} kills, {finished + 1} runs finished, all with the same bits")


def test_a_stop_that_was_asked_for_before_a_resumed_run_began(monkeypatch):
    """The processes agree on the next number that nobody has asked for, here 1."""
    from jax.experimental import multihost_utils

    watch, agreed = preemption.Watch(), {"on": 1}
    watch.many = True
    monkeypatch.setattr(
        multihost_utils,
        "reached_preemption_sync_point",
        lambda number: number == agreed["on"],
    )
    assert not watch.asked(501) and watch.asked_until(500)
    agreed["on"] = 500
    assert watch.asked_until(500) and not watch.asked_until(0)
    agreed["on"] = 501  # after the first step
    assert not watch.asked_until(500) and watch.asked(501)


def test_errors_that_came_of_another_process():
    of_jax = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    try:
        try:
            raise of_jax
        except jax.errors.JaxRuntimeError:
            raise TimeoutError("a save has not ended") from None
    except TimeoutError as error:
        found = UserError("run: cannot be written")
        found.__cause__ = error
    assert hosts._is_of_jax(found) and hosts._is_of_jax(of_jax)
    assert not hosts._is_of_jax(UserError("photo.jpg: cannot be read"))


@pytest.mark.parametrize("process", [0, 1])
def test_settings_that_are_not_the_same_everywhere(monkeypatch, process):
    client = SimpleNamespace()
    told = {}
    client.key_value_set = told.__setitem__
    client.blocking_key_value_get = lambda key, _: told[key]
    monkeypatch.setattr(hosts, "_client", lambda: client)
    monkeypatch.setattr(hosts.jax, "process_index", lambda: process)
    if process == 0:
        hosts._check_same({"config.optim.lr": 0.1}, 1)
        assert told
        return
    told[hosts._SETTINGS] = json.dumps({"config.optim.lr": 0.1, "config.seed": 0})
    hosts._check_same({"config.optim.lr": 0.1, "config.seed": 0}, 1)
    with pytest.raises(UserError, match=r"config.optim.lr is 0.2 here and 0.1 in proc"):
        hosts._check_same({"config.optim.lr": 0.2, "config.seed": 0}, 1)
