"""What a run writes for TensorBoard and its log, and that it depends on neither."""

import io
import sys
import time

import numpy as np

from mljax import config, terminal
from mljax.progress import Progress
from mljax.report import curves


def test_curves_of_a_run_that_was_stopped(tmp_path):
    from clu import metric_writers
    from tensorboard.backend.event_processing import plugin_event_accumulator

    for start, stop, add in ((1, 5, 0.0), (4, 8, 0.5)):
        if stop == 8:
            time.sleep(1.1)  # names of files begin with the second
            metric_writers.SummaryWriter(str(tmp_path / "other")).close()
        writer = terminal.curves_writer(tmp_path, start - 1)
        for step in range(start, stop):
            writer.write_scalars(step, {"train/loss": step + add})
        writer.close()
    found = curves.read_curves(tmp_path)
    steps, values = found.values["train/loss"]
    np.testing.assert_array_equal(steps, range(1, 8))
    np.testing.assert_allclose(values, [1, 2, 3, 4.5, 5.5, 6.5, 7.5])
    assert 0 <= found.seconds < 60
    # TensorBoard itself shows no step twice.
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in events.Tensors("train/loss")] == [*range(1, 8)]


def test_curves_beyond_where_the_run_that_went_on_is(tmp_path):
    from clu import metric_writers

    writer = metric_writers.SummaryWriter(str(tmp_path))
    for step in range(1, 9):
        writer.write_scalars(step, {"train/loss": step, "eval/mAP": step})
    writer.close()
    time.sleep(1.1)  # names of files begin with the second
    writer = terminal.curves_writer(tmp_path, 0)
    for step in range(1, 3):
        writer.write_scalars(step, {"train/loss": step + 0.5})
    writer.close()
    found = curves.read_curves(tmp_path)
    assert list(found.values) == ["train/loss"]
    np.testing.assert_array_equal(found.values["train/loss"], [[1, 2], [1.5, 2.5]])


def test_a_run_goes_on_where_its_curves_cannot_be_written(tmp_path, capsys):
    class Full:
        def write_scalars(self, step, values):
            raise OSError(28, "No space left on device")

    said = terminal.Terminal(config.common(), tmp_path, 10, 100, 0)
    said.close()
    said._writer = Full()
    said.config.train.log_every = 1
    metrics = {"finite": True, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}
    for step in (1, 2):
        said.step(step, metrics, Progress())
    said.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "tensorboard:", "step"]
    assert "no curves from here on ([Errno 28] No space left" in lines[1]


def test_a_run_goes_on_where_its_log_cannot_be_written(tmp_path, monkeypatch, capsys):
    said = terminal.Terminal(config.common(), tmp_path, 10, 100, 0)
    said.close()

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        full = Full()
        patch.setattr(sys, "stdout", full)
        said.say("one")
        assert sys.stdout is not full
        said.say("two")
    found = capsys.readouterr()
    assert not found.out
    words = "log: no more from here on ([Errno 28] No space left on device)"
    assert found.err.splitlines() == [words]
