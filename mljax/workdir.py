"""A work directory: its lock on one config, and files that are never half-written."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from mljax import config as configs
from mljax import whole
from mljax.errors import UserError

CONFIG = "config.json"
HISTORY = "metrics.jsonl"
SUMMARY = "metrics.json"
UNREADABLE = "unreadable.txt"
_LOCK = ".lock"
_LAST_SAVE = 30.0  # seconds in which a run that was told to stop may still be saving

# Keys that a run may change between a stop and the next start: they do not touch
# what is computed, or only where it could not go on otherwise.
FREE_KEYS = frozenset(
    {
        "data.root",
        "data.expected.labels",
        "data.expected.train",
        "data.expected.val",
        "data.max_pixels",  # as on_error: other images of a step stay the same
        "data.on_error",
        "data.parallel_reads",
        "data.prefetch",
        "eval.batch_size",
        "hosts.heartbeat_timeout",
        "hosts.start_timeout",
        "mesh.data",
        "mesh.fsdp",
        "model.remat",
        "optim.lr_from",  # optim.lr is what it gave
        "train.checkpoint_every",
        "train.log_every",
        "train.max_bad_steps",
        "train.patience",  # steps stay the same; there may be more of them
        "train.warmup_epochs",
        "profile",
        "published_mAP",
    }
)


def open_for_training(path: str, config: ConfigDict) -> Path:
    """Makes the directory, or checks that it belongs to the same config.

    Raises:
        UserError: it holds a run of another config, or files that are not a run.
    """
    workdir = Path(path).absolute()
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {path}: is a file, not a directory")
    stored = workdir / CONFIG
    if stored.exists():
        _check_same(path, read_config(workdir), config)
    elif workdir.exists() and any(not is_left(f) for f in workdir.iterdir()):
        raise UserError(
            f"--workdir {path}: is not empty and holds no mljax run; "
            "name a new or empty directory"
        )
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        keep_config(workdir, config)
    return workdir


def holds_checkpoint(path: str) -> bool:
    """Whether a run has saved a step there from which it can go on."""
    folder = Path(path) / "checkpoints"
    steps = folder.glob("[0-9]*")
    return (Path(path) / CONFIG).exists() and any(f.name.isdigit() for f in steps)


class Lock:
    """Of a work directory: two runs in it would overwrite each other's checkpoints.

    The system takes it back whenever the process ends. Where the file system has no
    locks (some buckets), nothing is locked; where it keeps those of a machine that is
    gone (NFS), it is only said. `patience`: seconds in which another run may end.
    """

    def __init__(self, path: str, patience: float = _LAST_SAVE):
        self.path, self.patience = path, patience
        self.note = ""  # for the terminal
        self._file: IO[str] | None = None
        self._is_new = False

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._file is not None:
            if self._is_new and isinstance(error, UserError):
                _let_go(Path(self.path))
            with contextlib.suppress(OSError):  # what could not be written was told
                self._file.close()

    def open_for_training(self, config: ConfigDict) -> None:
        """`open_for_training` of the directory, which is locked from then on.

        Raises UserError as that does, and as `take`. A directory that was new is as
        before if the user's next mistake comes to light before `keep`.
        """
        is_new = not (Path(self.path) / CONFIG).exists()
        open_for_training(self.path, config)
        self.take()
        open_for_training(self.path, config)  # a run that ended may have taken it back
        self._is_new = is_new and not self.note  # no other run is known of

    def keep(self) -> None:
        """From here on the directory holds something: curves, at least."""
        self._is_new = False

    def take(self) -> None:
        """Waits `patience` seconds at most for another run to end; does so once.

        Raises:
            UserError: it goes on, on this machine.
        """
        if self._file is not None:
            return
        file = self._file = (Path(self.path) / _LOCK).open("a+")
        until = time.monotonic() + self.patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.5)
                    continue
                file.seek(0)
                process, machine, *_ = [*file.read().splitlines(), "", ""]
                if machine == _machine():
                    raise UserError(
                        f"--workdir {self.path}: another run trains there ({process}); "
                        "wait for its end, stop it, or name another directory"
                    ) from None
                self.note = (
                    f"{self.path} is locked by {process or 'another machine'}: make "
                    "sure that no other run trains there"
                )
                return
            except OSError:
                return
        process = f"process {os.getpid()} on {socket.gethostname()}"
        with whole.named(file.name):
            file.truncate(0)
            file.write(f"{process}\n{_machine()}\n")
            file.flush()


def _let_go(workdir: Path) -> None:
    """Takes back what a run without a step made, so that others may be tried."""
    made = [workdir / name for name in ("label_graph.npz", "label_graph.png", CONFIG)]
    events = workdir / "tensorboard"
    if all(is_left(f) or f in (*made, events) for f in workdir.iterdir()):
        # On NFS a file that is open yet stays, by another name, until it is closed.
        shutil.rmtree(events, ignore_errors=True)
        for file in made:
            file.unlink(missing_ok=True)


def _machine() -> str:
    """Equal in all containers of a machine, until it starts anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def keep_config(workdir: Path, config: ConfigDict) -> None:
    """Writes the config that the run goes on with."""
    write_text(workdir / CONFIG, json.dumps(config.to_dict(), indent=2) + "\n")


def check_shared(path: str) -> None:
    """Raises UserError where the directory that process 0 opened cannot be seen."""
    stored = Path(path).absolute() / CONFIG
    for _ in range(60):  # file systems of a network take their time
        with contextlib.suppress(OSError):
            os.listdir(stored.parent)  # what they remember is not asked for anew
        if stored.exists():
            return
        time.sleep(1)
    raise UserError(
        f"--workdir {path}: what process 0 wrote there is not here; name a directory "
        "on a file system that all machines share"
    )


def read_config(workdir: Path) -> ConfigDict:
    """The config that a run was started with."""
    file = workdir / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise UserError(
            f"--workdir {workdir}: holds no run ({CONFIG} is missing)"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file}: is not the config of a run ({error}); put it back as it was, or "
            "name another directory"
        ) from error
    return configs.from_dict(found)


def _check_same(path: str, old: ConfigDict, new: ConfigDict) -> None:
    before, now = configs.flatten(old), configs.flatten(new)
    # What does nothing may change: flags that do are refused, which they once were not.
    for key in configs.all_idle(old) | configs.all_idle(new):
        now[key] = before[key]
    if changed := differences(before, now):
        raise UserError(
            f"--workdir {path}: holds a run of another config ({changed}); name "
            "another directory, or use the same settings to continue it"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed between two flat configs, "" if nothing but FREE_KEYS did."""
    changed = [
        f"{key} was {before[key]!r} and is now {value!r}"
        for key, value in now.items()
        if value != before[key] and key not in FREE_KEYS
    ]
    return "; ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")


def write_text(file: Path, text: str) -> None:
    """Writes all of `text` or nothing, whenever the process dies; process 0 does.

    What UTF-8 does not know (a byte in the name of a file) is written as \\udce9.
    """
    import jax  # here: `--help` of the programs has no use for it

    if jax.process_index():
        return
    with whole.replacing(file) as part:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())


def is_left(file: Path) -> bool:
    """Whether this is of a run that ended before it had a result, or of a file that a
    killed process was writing."""
    if file.name == "tensorboard" and not (file.parent / _LOCK).exists():
        return False  # of somebody else
    if file.name in ("checkpoints", "best", "tensorboard"):
        return file.is_dir() and not any(file.iterdir())
    if file.name == HISTORY:
        return not file.stat().st_size
    is_part = file.name.startswith(".") and file.name.endswith(".part")
    return is_part or file.name == _LOCK


def read_history(
    workdir: Path, last_step: int, needed: bool = False
) -> list[dict[str, Any]]:
    """The evaluations up to `last_step`, oldest first.

    Raises UserError where the file is damaged, or there are none though one is
    `needed`.
    """
    file = workdir / HISTORY
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        rows = [json.loads(line) for line in text.splitlines()]
        rows = [row for row in rows if row["step"] <= last_step]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file}: is damaged ({error}): a line must be an evaluation as JSON; put "
            "it back as it was"
        ) from error
    if needed and not rows:
        raise UserError(
            f"{file}: the evaluations that the run had are missing; put it back as it "
            "was"
        )
    return rows


def check_nothing_lost(workdir: Path) -> None:
    """Raises UserError if a new run would replace the results of another: there is no
    evaluation before its step is saved, so that checkpoints were taken away."""
    if read_history(workdir, sys.maxsize):
        raise UserError(
            f"--workdir {workdir}: holds the results of a run and no checkpoint to go "
            f"on from; name another directory, or delete {HISTORY} and best/ in it"
        )


def write_history(workdir: Path, rows: list[dict[str, Any]]) -> None:
    write_text(workdir / HISTORY, "".join(json.dumps(row) + "\n" for row in rows))


def write_summary(workdir: Path, summary: Mapping[str, Any]) -> None:
    write_text(workdir / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def write_unreadable(workdir: Path, names: set[str]) -> None:
    """The images that could not be read, a name a line; no file where there is none."""
    if names:
        lines = [name.replace("\n", "\\n") for name in sorted(names)]
        write_text(workdir / UNREADABLE, "".join(f"{line}\n" for line in lines))


def check_same_classes(path: str, saved: Mapping[str, Any], names: list[str]) -> None:
    """Raises UserError if a checkpoint was trained on other classes than `names`."""
    if saved["class_names"] != names:
        off = sorted(set(saved["class_names"]) ^ set(names))
        raise UserError(
            f"--workdir {path}: was trained on other classes than the data has (check "
            f"{', '.join(off[:5]) or 'their order'}); name another directory or the "
            "data it was trained on"
        )


def check_same_data(
    path: str, saved: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raises UserError if the data changed since a checkpoint was written."""
    check_same_classes(path, saved, now["class_names"])
    if saved["num_train"] != now["num_train"]:
        raise UserError(
            f"--workdir {path}: was trained on {saved['num_train']} images, the data "
            f"now has {now['num_train']}; name another directory"
        )
    before = saved.get("data", now["data"])  # checkpoints of old have none
    if changed := [name for name in before if before[name] != now["data"].get(name)]:
        images = " (labels or file names)"
        which = " and the ".join(n + images * n.endswith("images") for n in changed)
        raise UserError(
            f"--workdir {path}: the {which} have changed since the run "
            "began; name another directory, or use the data as it was"
        )
