"""What `mljax.predict` reads and writes: lists of images, files of predictions."""

import csv
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import numpy as np

from mljax import whole
from mljax.errors import UserError

FORMATS = (".csv", ".json", ".jsonl")
_IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
# These are images too: of the formats above by what is in them, or they get a row that
# says why they cannot be read.
_OTHERS = (".jpe", ".jfif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl")
_BETWEEN = ";"  # labels in a cell of a CSV file
_FIXED = ("path", "labels", "error")  # its other columns

NOT_A_NUMBER = "what the model gives for it is not a number"


class Row(NamedTuple):
    """What is said of one image.

    Attributes:
        path: as it was given.
        probabilities: float32 [num_classes]; empty where the image is unreadable.
        error: why it is; else "".
    """

    path: str
    probabilities: np.ndarray
    error: str


def checked(row: Row) -> Row:
    """The row, with an error where what the model gives is not a number."""
    if np.isfinite(row.probabilities).all():
        return row
    return Row(row.path, np.zeros(0, np.float32), NOT_A_NUMBER)


def find_images(what: str) -> list[str]:
    """The paths that `what` stands for, sorted unless a list gives their order.

    Args:
        what: a folder (the images in it and below it), one image, a text file with a
            path a line (relative to that file), or a pattern.

    Raises:
        UserError: there are none, or a list cannot be read.
    """
    if not what:
        raise UserError("--images is empty: name a folder (. is this one) or an image")
    path = Path(what)
    if path.is_dir():
        found = sorted(
            str(file)
            for file in _files_below(path)
            if file.suffix.lower() in _IMAGES + _OTHERS
            and (file.is_file() or file.is_symlink())
            and not file.name.startswith("._")  # what macOS leaves beside a file
        )
        if not found:
            raise UserError(
                f"--images {what}: has no images ({', '.join(_IMAGES)}), nor have the "
                "folders below it"
            )
        return found
    if path.is_file():
        if path.suffix.lower() in _IMAGES + _OTHERS:
            return [what]
        return _read_list(path)
    found = sorted(p for p in glob.glob(what, recursive=True) if os.path.isfile(p))
    if not found:
        raise UserError(
            f"--images {what}: there is no such folder or file, and as a pattern it "
            "matches nothing"
        )
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """The files in it and below it, also behind links to folders that lie elsewhere."""
    entered = [Path(os.path.realpath(folder))]

    def leads_elsewhere(link: str) -> bool:
        real = Path(os.path.realpath(link))
        if any(real.is_relative_to(e) or e.is_relative_to(real) for e in entered):
            return False
        entered.append(real)
        return True

    def cannot_list(error: OSError) -> NoReturn:
        raise UserError(
            f"--images {error.filename}: cannot be listed ({error.strerror}); give "
            "the right to read it, or name the folders beside it"
        )

    for where, folders, files in os.walk(folder, onerror=cannot_list, followlinks=True):
        yield from (Path(where, name) for name in files)
        paths = {name: os.path.join(where, name) for name in sorted(folders)}
        folders[:] = [
            name
            for name, path in paths.items()
            if not os.path.islink(path) or leads_elsewhere(path)
        ]


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--images {path}: is neither an image by its name ({', '.join(_IMAGES)}) "
            "nor a text file with a path a line"
        ) from None
    found = [str(path.parent / line.strip()) for line in lines if line.strip()]
    if not found:
        raise UserError(f"--images {path}: names no images (one path a line)")
    if not any(map(os.path.isfile, found)):
        raise UserError(
            f"--images {path}: no line of it is the path of a file, relative to its "
            "folder; name the folder of the images, or a list of their paths"
        )
    return found


class Writer:
    """Writes one row an image, in the format that the name of the file asks for.

    CSV: path, labels (between semicolons; as JSON lists where the name of a class has
    a semicolon), a column for each class (p(path) for one called path), error. JSON: a
    list of objects; JSON lines: the same objects, one a line.
    """

    def __init__(self, file: IO[str], kind: str):
        self._file, self._kind, self._rows = file, kind, 0
        self._csv = csv.writer(file)
        self._names: list[str] = []

    def begin(self, class_names: list[str]) -> None:
        self._names = class_names
        if self._kind == ".csv":
            path, labels, error = _FIXED
            columns = [f"p({n})" if n in _FIXED else n for n in class_names]
            self._csv.writerow([path, labels, *columns, error])
        elif self._kind == ".json":
            self._file.write("[")

    def add(self, row: Row, labels: list[str]) -> None:
        # The shortest digits that give the same float32 again: what is close to 0 or
        # 1 keeps its order.
        exact = row.probabilities.astype(np.float32)
        numbers: list[float | str] = [float(str(p)) for p in exact]
        self._rows += 1
        if self._kind == ".csv":
            cells = numbers or [""] * len(self._names)
            joined = _BETWEEN.join(labels)
            if any(_BETWEEN in name for name in self._names):
                joined = json.dumps(labels, ensure_ascii=False)
            self._csv.writerow([row.path, joined, *cells, row.error])
            return
        entry: dict[str, object] = {"path": row.path, "error": row.error}
        if not row.error:
            probabilities = dict(zip(self._names, numbers, strict=True))
            entry = {"path": row.path, "labels": labels, "probabilities": probabilities}
        text = json.dumps(entry, ensure_ascii=False)
        if self._kind == ".jsonl":
            self._file.write(text + "\n")
        else:
            self._file.write(("\n" if self._rows == 1 else ",\n") + text)

    def end(self) -> None:
        if self._kind == ".json":
            self._file.write("\n]\n")


def check_writable(flag: str, path: Path) -> None:
    """Raises UserError unless a file can be written at `path`; before any work.

    Tried with a file beside it: what a folder allows is known only then.
    """
    part = whole.part_of(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        part.touch()
        part.unlink()
    except OSError as error:
        raise _unwritable(flag, path, error) from None


def _unwritable(flag: str, path: Path, error: OSError) -> UserError:
    return UserError(
        f"{flag} {path}: cannot be written ({error.strerror}); name another place"
    )


@contextmanager
def writer(output: str) -> Iterator[Writer]:
    """A `Writer` whose file appears under its name once it is complete.

    Raises:
        UserError: another format, or the file cannot be written there.
        OSError: names it; the disk is full.
    """
    path = Path(output)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise UserError(f"--output {output}: must end in {', '.join(FORMATS)}")
    part = whole.part_of(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        file = part.open(
            "w",
            encoding="utf-8",
            errors="backslashreplace",  # names of files need not be UTF-8
            newline="" if kind == ".csv" else None,
        )
    except OSError as error:
        raise _unwritable("--output", path, error) from None
    try:
        with whole.named(path), file:
            made = Writer(file, kind)
            yield made
            made.end()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
