"""What a run says: lines on the terminal and curves in TensorBoard."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mljax import finetune, speed, tables
from mljax.data.source import Sources
from mljax.early_stopping import Decision
from mljax.errors import UserError, complain
from mljax.progress import Progress
from mljax.run import Run


class Terminal:
    """Speaks on the first process only; the others are silent."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        steps_per_epoch: int,
        total_steps: int,
        start: int,
    ):
        self.config = config
        self.folder = folder
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.start = start
        self.first = jax.process_index() == 0
        self.speed = speed.Speed(config.batch_size)
        self._loss, self._steps = 0.0, 0
        self._unreadable = 0
        self._writer: Any = None
        if self.first:
            self._writer = curves_writer(folder / "tensorboard", start)

    def say(self, text: str) -> None:
        if not self.first:
            return
        try:
            print(text, flush=True)
        except OSError as error:  # nor does a run end for its log
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115 (until the end)
            complain(f"log: no more from here on ({error})")

    def opening(
        self,
        run: Run,
        sources: Sources,
        chosen_on: str,
        params: Any,
        notes: list[str],
    ) -> None:
        """The data, the model and the plan, before the first step."""
        model = self.config.model
        for name, source in sources._asdict().items():
            if source is not None:
                per_image = (source.labels == 1).sum() / max(1, len(source))
                self.say(
                    f"{name + ':':<9}{tables.count(len(source), 'image')}, "
                    f"{len(source.class_names)} classes, {per_image:.2f} labels an "
                    "image"
                )
                for note in source.notes:
                    self.say(f"{name + ':':<9}{note}")
                train = name == "train"
                for classes, what, effect in (
                    (source.never_present(), "positive", "they have no AP"),
                    (
                        source.never_absent(),
                        "known negative",
                        "their AP is always 100",
                    ),
                ):
                    if classes:
                        why = "" if train else f" ({effect})"
                        shown = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
                        count = f"{len(classes)} classes without a {what}"
                        self.say(f"{name + ':':<9}{count}{why}: {shown}")
        twice = "2 x " if run.is_pair else ""
        params = finetune.one_network(params)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        device = jax.devices()[0]
        self.say(
            f"model:   {twice}{model.backbone} + {model.head}, {count / 1e6:.2f} M "
            f"parameters, loss {self.config.loss.name}, "
            f"{run.mesh.size} x {device.device_kind}"
        )
        if not self.config.init_from:
            self.say("weights: random at first (config.init_from names others)")
        for note in notes:
            self.say(f"weights: {note}")
        rates = finetune.report(params, self.config.optim)
        if rates:
            self.say(rates)
        steps = tables.count(self.total_steps, "step")
        self.say(f"plan:    {steps}, the best epoch chosen on {chosen_on}")
        if self.start:
            self.say(f"resumed at step {self.start}")

    def profile(self, trace: Path | None) -> None:
        """Where a profiler's trace was written, if one was."""
        if trace:
            self.say(f"profile: {trace}")

    def first_step(self, seconds: float) -> None:
        self.say(
            f"first step done {seconds:.1f} s after the start (compiling included)"
        )
        self.restart_clock()

    def thawed(self) -> None:
        self.say("nothing is frozen from here on")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of images/s what came before: evaluation, saving, compiling."""
        self.speed.restart()
        self._steps, self._loss = 0, 0.0

    def step(self, at: int, metrics: Mapping[str, Any], progress: Progress) -> None:
        """Takes the metrics of step `at`; speaks every `train.log_every` steps."""
        self.speed.step()
        if not metrics["finite"]:
            self.say(
                f"step {at} skipped: its loss or gradient is not finite "
                f"({progress.skipped} so far)"
            )
        else:
            self._loss += float(metrics["loss"])
            self._steps += 1
        self.unreadable(progress)
        if at % self.config.train.log_every or not self._steps:
            return
        loss = self._loss / self._steps
        found = self.speed.read()
        rate = float(metrics["learning_rate"])
        line = (
            f"step {at}/{self.total_steps}  epoch {at / self.steps_per_epoch:.2f}  "
            f"loss {loss:.4g}  lr {rate:.3g}"
        )
        if found:  # none where the first step of a process is the only one so far
            left = (self.total_steps - at) * found["step_ms"] / 1e3
            line += f"  {found['images_per_second']:.0f} images/s"
            if self.speed.devices > 1:
                each = found["images_per_second_per_device"]
                line += f" ({each:.{1 if each < 10 else 0}f} a device)"
            line += f"  {_clock(left)} left  {speed.text(found)}"
        self.say(line)
        if self._writer:
            values = {
                "train/loss": loss,
                "train/learning_rate": rate,
                "train/grad_norm": float(metrics["grad_norm"]),
                "train/skipped_steps": progress.skipped,
                "train/unreadable_images": self._unreadable,
                **{f"train/{name}": value for name, value in (found or {}).items()},
            }
            self._curves(lambda writer: writer.write_scalars(at, values))
        self.restart_clock()

    def unreadable(self, progress: Progress) -> None:
        """Says how many images could not be read, where there are new ones."""
        if len(progress.unreadable) > self._unreadable:
            self._unreadable = len(progress.unreadable)
            images = tables.count(self._unreadable, "image")
            self.say(f"{images} could not be read: unreadable.txt")

    def evaluation(self, row: Mapping[str, Any], decision: Decision) -> None:
        ema = "" if row["mAP_ema"] is None else f", ema {100 * row['mAP_ema']:.2f}"
        pair = ""
        if "network" in row:
            one, two = 100 * row["mAP_one"], 100 * row["mAP_two"]
            pair = f"network one {one:.2f}, two {two:.2f}; "
        self.say(
            f"epoch {row['epoch']}: mAP {100 * row['mAP']:.2f} "
            f"({pair}raw {100 * row['mAP_raw']:.2f}{ema})  CF1 {100 * row['CF1']:.2f}  "
            f"OF1 {100 * row['OF1']:.2f}{'  best so far' if decision.is_best else ''}"
        )
        if count := row.get("nan_images"):
            self.say(nan_note(count))
        if decision.stop:
            self.say("early stopping: no improvement worth more epochs")
        if self._writer:
            keys = ("mAP", "mAP_raw", "mAP_ema", "mAP_one", "mAP_two", "CF1", "OF1")
            values = {f"eval/{k}": row[k] for k in keys if row.get(k) is not None}
            self._curves(lambda writer: writer.write_scalars(row["step"], values))
            self.flush()

    def flush(self) -> None:
        """Returns once the curves up to here are written."""
        self._curves(lambda writer: writer.flush())

    def close(self) -> None:
        self._curves(lambda writer: writer.close())

    def _curves(self, act: Callable[[Any], None]) -> None:
        """A run does not end for its curves: says once that there are no more."""
        if self._writer is None:
            return
        try:
            act(self._writer)
        except Exception as error:  # of TensorFlow, which clu raises as its own
            self._writer = None
            said = str(error.__cause__ or error) or repr(error)
            reason = said.split("}} ")[-1].strip().splitlines()[0][:200]
            self.say(f"tensorboard: no curves from here on ({reason})")


def curves_writer(folder: Path, start: int) -> Any:
    """A clu writer of what follows step `start`; TensorBoard is told to forget what a
    run that was killed has written of the same steps."""
    import tensorflow as tf
    from clu import metric_writers
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    if folder.exists():
        # Files are read by name: this one comes before that of the writer, whose name
        # has the time, the machine and more.
        now = time.time()
        file = folder / f"events.out.tfevents.{int(now):010}.0"
        session = SessionLog(status=SessionLog.START)
        try:
            with tf.io.TFRecordWriter(str(file)) as forget:
                for event in (
                    Event(wall_time=now, file_version="brain.Event:2"),
                    Event(wall_time=now, step=start + 1, session_log=session),
                ):
                    forget.write(event.SerializeToString())
        except tf.errors.OpError as error:
            raise UserError(f"{file}: cannot be written ({error.message})") from None
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))


def nan_note(count: int) -> str:
    return (
        f"not a number: the outputs for {count} images, counted as the lowest; "
        "training is unstable, lower config.optim.lr"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
