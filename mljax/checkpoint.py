"""Saving and loading with Orbax. Nothing in a checkpoint is ever executed.

`WORKDIR/checkpoints/STEP` holds the whole training state (the last two), `WORKDIR/best/
STEP` the weights to use: `params` and `batch_stats`, averaged or raw, whichever was
better. Both carry a JSON description (config, class names, progress); what came of the
evaluation of a step is in a file beside its state.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mljax import hosts, workdir
from mljax.errors import UserError
from mljax.models.functional import NETWORKS

FORMAT = 1  # of the description; raised when older code could not read it
_AGAIN = "copy the whole directory again, or name another step"
_AMENDED = "amended.json"
_LAST_WRITE = 60.0  # seconds
_KEEP = 2  # the older one stays until the newer one is wholly written


class Checkpoints:
    """The steps saved in one folder. Every process calls every method."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pending: Any = None
        with _readable_errors(folder):
            self._orbax = ocp.training.Checkpointer(
                folder,
                preservation_policy=ocp.training.preservation_policies.LatestN(_KEEP),
                cleanup_tmp_directories=True,
            )
        # Orbax asks too, for its statistics, by steps long past and from a thread: the
        # processes would no longer agree on the step to stop after.
        manager = getattr(self._orbax, "_manager", None)
        if manager is not None:
            manager.reached_preemption = lambda step: False

    def latest(self) -> int | None:
        """The newest step that was wholly written, or None."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, about: Mapping[str, Any]) -> None:
        """Starts writing `state` in the background, once the last save has ended.

        Raises:
            UserError: this save or the one before could not be written.
        """
        self.wait()
        with _readable_errors(self.folder):
            self._pending = self._orbax.save_async(
                step,
                state,
                force=True,
                overwrite=True,
                custom_metadata={"format": FORMAT, **about},
            )

    def wait(self) -> None:
        """Returns once the last save is on the disk; raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with _readable_errors(self.folder):
                pending.result()

    def about(self, step: int) -> dict[str, Any]:
        """The description saved with `step`."""
        folder = self.folder / str(step)
        with _readable_errors(folder, damaged=self._advice(step)):
            found = self._orbax.checkpointables_metadata(step).custom_metadata
        return check_format(found, folder, self._advice(step)) | self._amended(step)

    def amend(self, step: int, **about: Any) -> None:
        """Changes the description of a step that is wholly written; all or nothing."""
        workdir.write_text(self.folder / str(step) / _AMENDED, json.dumps(about))

    def _amended(self, step: int) -> dict[str, Any]:
        file = self.folder / str(step) / _AMENDED
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{file}: is damaged ({error}); delete it, and the step is evaluated "
                "again"
            ) from None

    def _advice(self, step: int) -> str:
        """What to do where `step` is damaged."""
        before = [saved for saved in _steps(self.folder) if saved < step]
        if not before:
            return "copy the whole directory again"
        return (
            f"copy the whole directory again, or move {self.folder / str(step)} away "
            f"to go on from step {max(before)}"
        )

    def load(self, step: int, abstract: Any) -> Any:
        """The state of `step` in the shapes, types and shardings of `abstract`.

        `abstract` is a dict or a dataclass. A part of a dataclass that is None may be
        missing: the state was saved before there was such a part.
        """
        folder = self.folder / str(step)
        with _readable_errors(folder, damaged=self._advice(step)):
            if isinstance(abstract, Mapping):
                return self._orbax.load(step, abstract)
            saved = ocp.metadata(folder, checkpointable_name="state").metadata
            if saved is None:
                raise ValueError("its state cannot be read")
            wanted = {
                name: part
                for name, part in vars(abstract).items()
                if name in saved or part is not None
            }
            return replace(abstract, **self._orbax.load(step, wanted))

    def drop_after(self, step: int) -> None:
        """Deletes what was saved after `step`: it will be computed again."""
        # Those that process 0 sees: a network's file system may show others less.
        with _readable_errors(self.folder):
            for saved in hosts.of_first([c.step for c in self._orbax.checkpoints]):
                if saved > step:
                    self._orbax.delete(saved, missing_ok=True)

    def close(self) -> None:
        self.wait()
        with _readable_errors(self.folder):
            self._orbax.close()


@contextlib.contextmanager
def finishing(*saves: Checkpoints) -> Iterator[None]:
    """What is being written in the background when something fails is written to its
    end first, within a minute where that takes other processes, which may be gone."""
    try:
        yield
    except Exception:
        for each in saves:
            waiting = threading.Thread(target=_wait_quietly, args=(each,), daemon=True)
            waiting.start()
            waiting.join(_LAST_WRITE if jax.process_count() > 1 else None)
        raise


def _wait_quietly(saves: Checkpoints) -> None:
    with contextlib.suppress(Exception):  # the first error is the one to tell
        saves.wait()


def check_format(found: Any, path: Path, advice: str = _AGAIN) -> dict[str, Any]:
    stored = found["format"] if isinstance(found, dict) and "format" in found else None
    if type(stored) is not int or stored < 1:
        raise UserError(
            f"{path}: is not a checkpoint of mljax, or was not copied whole; {advice}"
        )
    if found["format"] > FORMAT:
        raise UserError(
            f"{path}: was written by a newer mljax (format {found['format']}, this one "
            f"reads up to {FORMAT}); upgrade mljax"
        )
    return found


def find_best(path: Path) -> Path:
    """The saved step to use: `path` itself, or the best of a work directory.

    Raises:
        UserError: there is none.
    """
    best = path / "best"
    folder = best if best.is_dir() else path
    if steps := _steps(folder):
        return folder / str(max(steps))
    if not (path / "_CHECKPOINT_METADATA").is_file():  # Orbax writes it last
        if (path / "state").is_dir():
            raise UserError(
                f"{path}: is not whole (_CHECKPOINT_METADATA is missing); {_AGAIN}"
            )
        if not path.exists():
            raise UserError(f"{path}: there is no such directory")
        if saved := _steps(path / "checkpoints"):
            raise UserError(
                f"{path}: holds no checkpoint of an evaluation (best/) yet or any "
                "more: go on training, or name a step such as "
                f"{path / 'checkpoints' / str(max(saved))}"
            )
        raise UserError(
            f"{path}: holds no checkpoint (neither best/ nor a saved step); name a "
            "work directory or a step of it"
        )
    return path


def _steps(folder: Path) -> list[int]:
    """The steps that are saved in a folder."""
    return [int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()]


def describe(path: Path) -> dict[str, Any]:
    """The description of a saved step."""
    with _readable_errors(path):
        # A saved step holds one checkpointable, "state".
        return check_format(ocp.checkpointables_metadata(path).custom_metadata, path)


def load_variables(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of a saved step and its description.

    Args:
        path: a step written by `Checkpoints.save`, of `best/` or `checkpoints/`.

    Returns:
        `{"params", "batch_stats"}` as nested dicts of numpy arrays, and the
        description (config, class_names, progress).
    """
    about = describe(path)
    with _readable_errors(path, damaged=_AGAIN):
        found = ocp.metadata(path, checkpointable_name="state").metadata
        if found is None:
            raise ValueError("its state cannot be read")
        if set(found["params"]) == set(NETWORKS):
            raise UserError(
                f"{path}: holds the two networks of a run with config.mutual; its work "
                "directory has the better one, ready for use, in best/"
            )
        wanted = {
            name: jax.tree.map(_on_host, found[name])
            for name in ("params", "batch_stats")
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            tree = ocp.load(path, wanted, checkpointable_name="state")
    return jax.tree.map(jax.device_get, tree), about


def check_free(path: Path) -> None:
    """Raises UserError unless `path` is new or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; name a new or empty directory")


def save_variables(
    path: Path, variables: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes a directory that `load_variables` and plain Orbax read, whole or not.

    Args:
        path: absolute; a new directory, or an empty one.
        variables: `{"params", "batch_stats"}`.
        about: the description (config, class_names).

    Raises:
        UserError: `path` is not empty, or it could not be written.
    """
    check_free(path)
    with _readable_errors(path):
        # Orbax takes an empty directory for a checkpoint to overwrite.
        ocp.save(
            path,
            dict(variables),
            overwrite=path.exists(),
            custom_metadata={"format": FORMAT, **about},
        )


def _on_host(leaf: Any) -> jax.ShapeDtypeStruct:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


class _readable_errors:
    """Turns what Orbax raises into one line that names the folder.

    damaged: what to do, while a checkpoint is read that was written long ago.
    """

    def __init__(self, path: Path, damaged: str = ""):
        self.path, self.damaged = path, damaged

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError | KeyboardInterrupt):
            return
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        text = " ".join(str(c) for c in causes)
        full = ("No space left", "File too large", "Disk quota", "RESOURCE_EXHAUSTED")
        if any(sign in text for sign in full):
            raise UserError(
                f"{self.path}: the checkpoint could not be written (disk full or file "
                "too large); free some space and run the same command again: the last "
                "whole checkpoint is kept"
            ) from error
        # Some say nothing.
        first = next((c for c in reversed(causes) if str(c).strip()), causes[-1])
        reason = f"{type(first).__name__}: {' '.join(str(first).split())[:300]}"
        if self.damaged:
            raise UserError(
                f"{self.path}: is damaged, or was not copied whole ({reason}); "
                f"{self.damaged}"
            ) from error
        raise UserError(f"{self.path}: {reason}") from error
