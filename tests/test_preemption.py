"""A run that is asked to stop saves its last step, says so, and goes on to the bits."""

import errno
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT, TINY, environment, last_line, same_results
from tiny_program import Tiny

from mljax import config, evaluate, memory, models, preemption, speed, train
from mljax import main as program
from mljax.checkpoint import Checkpoints
from mljax.errors import Stopped, Temporary, UserError
from mljax.terminal import Terminal


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", Tiny)
    settings = config.load("configs/shapes.py", "debug")
    settings.epochs, settings.batch_size = 3, 16  # of four steps
    settings.data.update(num_train=64, num_val=32)
    settings.model.update(backbone="tiny", dropout=0.1)
    settings.eval.batch_size = 32
    config.validate(settings)
    return settings


def stop_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends a signal while `step` is in progress."""
    speak = Terminal.step

    def step_and_send(self, at, metrics, progress):
        speak(self, at, metrics, progress)
        if at == step - 1:  # it is absorbed once the next one runs
            signal.raise_signal(number)

    monkeypatch.setattr(Terminal, "step", step_and_send)


def test_sigterm_at_any_step(settings, monkeypatch, tmp_path, capsys):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    settings.profile = "2:3"  # of config.json, which is compared, too
    train.train(settings, str(tmp_path / "whole"))
    said = capsys.readouterr().out
    assert "ms a step (" in said and " GB  " in said and " GFLOP/s" in said
    traces = list((tmp_path / "whole" / "tensorboard").rglob("*.xplane.pb"))
    assert len(traces) == 1 and "profile: " in said
    # In the middle of an epoch; at the last step, where an evaluation is due.
    for step in (6, 12):
        run = tmp_path / f"run{step}"
        with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
            stop_at(patch, step, signal.SIGTERM)
            train.train(settings, str(run))
        assert stopped.value.exit_code == preemption.RESTART == 75
        assert f"saved at step {step}" in str(stopped.value)
        assert f"epoch {step // 4}: mAP" not in capsys.readouterr().out or step % 4
        train.train(settings, str(run))
        assert f"resumed at step {step}" in capsys.readouterr().out
        same_results(tmp_path / "whole", run)
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]


def test_what_ends_an_evaluation_costs_no_steps(settings, monkeypatch, tmp_path):
    """A signal in it, or a picture that cannot be read."""
    train.train(settings, str(tmp_path / "whole"))
    run = evaluate.run

    def signalled(step, variants, batches, *rest):
        return run(step, variants, send(batches), *rest)

    def send(batches):
        for batch in batches:
            signal.raise_signal(signal.SIGTERM)
            yield batch

    def unreadable(step, variants, batches, *rest):
        raise UserError("photo.jpg: cannot be read")

    for name, form, error in (
        ("signalled", signalled, Stopped),
        ("unreadable", unreadable, UserError),
    ):
        folder = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(evaluate, "run", form)
            train.train(settings, str(folder))
        assert Checkpoints(folder / "checkpoints").latest() == 4
        assert not (folder / "metrics.jsonl").read_text()
        train.train(settings, str(folder))
        same_results(tmp_path / "whole", folder)


@pytest.mark.slow
def test_killed_in_the_evaluation_that_was_left(settings, monkeypatch, tmp_path):
    train.train(settings, str(tmp_path / "whole"))
    run = str(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 8, signal.SIGTERM)
        train.train(settings, run)

    def die(self, step, **about):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "amend", die)
        train.train(settings, run)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 8
    train.train(settings, run)
    same_results(tmp_path / "whole", tmp_path / "run")


def test_a_run_goes_on_where_what_it_began_with_is_gone(
    settings, monkeypatch, tmp_path, capsys
):
    """A machine that takes over has the work directory and the data, no more."""
    settings.epochs = 1
    train.train(settings, str(tmp_path / "first"))
    found = {"lr": 0.0123, "method": "tpe", "config": settings.to_dict()}
    found["config"]["init_from"] = "weights"
    (tmp_path / "learning_rate.json").write_text(json.dumps(found))
    settings.init_from = str(tmp_path / "first")
    settings.optim.lr_from = str(tmp_path / "learning_rate.json")
    train.train(settings, str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3, signal.SIGTERM)
        train.train(settings, str(tmp_path / "run"))
    (tmp_path / "first").rename(tmp_path / "gone")
    (tmp_path / "learning_rate.json").unlink()
    train.train(settings, str(tmp_path / "run"))
    assert "lr:      0.0123, as this run began" in capsys.readouterr().out
    same_results(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(UserError, match="lr_from = .*: there is no"):
        train.train(settings, str(tmp_path / "another"))
    # A folder with the name of a step is no checkpoint.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints/3: is not a checkpoint"):
        train.train(settings, str(tmp_path / "run"))
    # Nor does a run go on from step 0: it begins again, from what it began with.
    (tmp_path / "run" / "checkpoints" / "3").rename(
        tmp_path / "run" / "checkpoints" / "0"
    )
    with pytest.raises(UserError, match="another directory, or delete metrics.jsonl"):
        train.train(settings, str(tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(UserError, match="first: there is no such file"):
        train.train(settings, str(tmp_path / "run"))


def test_ctrl_c_saves_once_and_ends_at_once_the_second_time(
    settings, monkeypatch, tmp_path, capsys
):
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        stop_at(patch, 6, signal.SIGINT)
        train.train(settings, str(tmp_path / "run"))
    assert stopped.value.exit_code == 130
    assert "Ctrl-C again" in capsys.readouterr().err
    # pytest-xdist ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, 8, signal.SIGINT)
            stop_at(patch, 8, signal.SIGINT)
            train.train(settings, str(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, before)


class Gone(io.StringIO):
    """stderr of `2>&1 | tee`, which Ctrl-C has ended too."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_ctrl_c_that_nobody_can_be_told_of(settings, monkeypatch, tmp_path):
    run = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 6, signal.SIGINT)
        patch.setattr(sys, "stderr", Gone())
        assert program.exit_code(lambda: train.train(settings, run)) == 130
        patch.setattr(sys, "stderr", Gone())
        assert program.exit_code(lambda: train.train(settings, "")) == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 6


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EIO, "Input/output error"), 75),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (Temporary("photo.jpg: is its disk there?"), 75),
        (UserError("config.optim.lr = -1: must be above 0"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_only_what_may_pass_is_started_again(error, code, capsys):
    def job():
        if not isinstance(error, OSError):
            raise error
        try:
            raise error
        except OSError as cause:
            raise UserError("the checkpoint could not be written") from cause

    assert program.exit_code(job) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_program_exits_with_75(tmp_path):
    flags = [*TINY, "--config.model.backbone=tiny", "--config.epochs=400"]
    process = subprocess.Popen(
        [sys.executable, "tests/tiny_program.py", "main", *flags]
        + [f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment(tmp_path / "cache") | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    _, error = process.communicate(timeout=100)
    assert process.returncode == 75, error
    assert last_line(error).endswith(": the same command goes on from here")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 400


def test_figures_of_speed(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock["now"])
    found = speed.Speed(64)
    found.devices, found.flops, found.peak = 8, 4e12, 1e12

    def slow():
        while True:
            clock["now"] += 0.5
            yield None

    batches = found.timed(slow())
    for _ in range(4):
        next(batches)
        clock["now"] += 1.5
        found.step()
    figures = found.read()
    assert figures["step_ms"] == 2000 and figures["data_wait_ms"] == 500
    assert figures["images_per_second"] == 32
    assert figures["images_per_second_per_device"] == 4
    assert figures["teraflops_per_device"] == 0.25 and figures["share_of_peak"] == 0.25
    assert "2000 ms a step (25% for data)" in speed.text(figures)
    assert "250 GFLOP/s (25% of peak)" in speed.text(figures)
    assert 1e8 < memory.peak_bytes() < 1e12


@pytest.mark.parametrize(
    ("batch_s", "least", "most"), [(0.1, 0, 0.05), (0.3, 0.05, 0.2), (0.8, 0.5, 0.75)]
)
def test_only_waiting_while_nothing_is_computed_counts(batch_s, least, most):
    class Computing:
        """What a step of 0.2 s gives."""

        def __init__(self):
            self.end = time.perf_counter() + 0.2

        def is_ready(self):
            return time.perf_counter() > self.end

    def batches():
        while True:
            time.sleep(batch_s)
            yield None

    found, steps = speed.Speed(64), 4
    timed = found.timed(batches())
    next(timed)  # nothing is computed yet
    found.restart()
    for _ in range(steps):
        metrics = Computing()
        found.dispatched({"loss": metrics})
        next(timed)
        while not metrics.is_ready():  # as the loop waits for the step before
            time.sleep(0.01)
        found.step()
    assert least <= found.read()["data_wait_ms"] / 1e3 <= most


def test_steps_that_end_where_they_are_called_count_then(monkeypatch):
    """The metrics of a step are fetched after the next one, those of the last two at
    once: on a CPU, where no step is left running, each still has its own time."""

    class Ended:
        def is_ready(self):
            return True

    clock = {"now": 0.0}
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock["now"])
    found, times = speed.Speed(64), []
    for at in range(3):
        clock["now"] += 2.0
        found.dispatched({"loss": Ended()})
        for _ in range((at > 0) + (at == 2)):
            found.step()
            times.append(found.read()["step_ms"])
            found.restart()
    assert times == [2000, 2000, 2000]


def test_peaks_are_found_by_the_longest_name():
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert speed.peak_of(Device) == 989e12
    Device.device_kind = "TPU v5 lite"
    assert speed.peak_of(Device) == 197e12
    Device.device_kind = "TPU v5p"
    assert speed.peak_of(Device) == 459e12
    Device.device_kind = "cpu"
    assert speed.peak_of(Device) == 0
