"""What the sources with image files share: is each there, which are equal, reading."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mljax.data.decode import decode
from mljax.data.source import Source
from mljax.errors import UserError

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def missing_policy(data_config: ConfigDict) -> str:
    """What to do about image files that are not there, see `from_files`."""
    if data_config.drop_missing:
        return "drop"
    return "keep" if data_config.on_error == "skip" else "stop"


def from_files(
    where: str,
    *,
    class_names: Sequence[str],
    labels: np.ndarray,
    names: Sequence[str],
    files: Sequence[str],
    split: str,
    max_pixels: int,
    missing: str,
    folder: str,
    objects: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> Source:
    """A source of image files.

    Args:
        where: the file that lists them, for messages.
        class_names: of the columns of `labels`.
        labels: int8 [num_images, num_classes].
        names: as the images are called in `where`, for messages.
        files: their paths.
        split: "train" or "val".
        max_pixels: a larger image counts as unreadable.
        missing: of a file that is not there: "stop", "keep" (it counts as unreadable
            when its turn comes) or "drop" (left out; the order of the others is as if
            it had never been listed).
        folder: what the names are relative to, for messages.
        objects: see `Source`.
        notes: see `Source`.

    Raises:
        UserError: images are missing, or all of them are.
    """
    encoded = [_encoded(file) for file in files]
    possible = np.array([name is not None for name in encoded], bool)
    present = possible if missing == "keep" else possible & _are_there(files)
    absent = np.flatnonzero(~present).tolist()
    notes = [*notes, *_contradictions(names, labels)]
    if len(absent) and missing == "drop":
        if len(absent) == len(files):
            raise UserError(
                f"{where}: not one of its {len(files)} image files is there (looked "
                f"for {quoted(files[0])})"
            )
        notes.append(f"{len(absent)} of {len(files)} images are missing, left out")
    elif len(absent):
        if missing == "keep":
            raise UserError(
                f"{where}: {quoted(names[absent[0]])} cannot be the name of a file"
            )
        slash = "; / stands between folders here" if "\\" in names[absent[0]] else ""
        raise UserError(
            f"{where}: image file {quoted(names[absent[0]])} is missing "
            f"({len(absent)} of {len(files)} are); paths are relative to "
            f"{folder or '.'}{slash} "
            "(data.drop_missing=true leaves them out, data.on_error=skip shows black "
            "pictures in their place)"
        )
    keep = np.flatnonzero(present).tolist()
    all_there = len(keep) == len(files)
    kept = [files[i] for i in keep]
    paths = tf.constant([encoded[i] for i in keep], tf.string)

    def read_file(index: tf.Tensor) -> tf.Tensor:
        return tf.io.read_file(tf.gather(paths, index))

    return Source(
        class_names=list(class_names),
        labels=labels if all_there else labels[keep],
        names=kept,
        read=lambda index: decode(read_file(index), max_pixels),
        split=split,
        content=lambda: content_keys(kept),
        encoded=read_file,
        objects=objects if objects is None or all_there else objects[keep],
        notes=tuple(notes),
    )


def is_name(text: str) -> bool:
    """Whether a class can be called so: not blank, and text that can be written (JSON
    allows halves of characters)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text.strip())


def _contradictions(names: Sequence[str], labels: np.ndarray) -> list[str]:
    """A note where an image is listed several times, with different labels."""
    first: dict[str, int] = {}
    off = [
        name
        for row, name in enumerate(names)
        if (before := first.setdefault(os.path.normpath(name), row)) != row
        and not np.array_equal(labels[before], labels[row])
    ]
    if not off:
        return []
    return [
        f"{len(set(off))} images are listed more than once with other labels, such as "
        f"{quoted(off[0])}: each line counts as an image of its own"
    ]


def content_keys(files: Sequence[str]) -> list[str]:
    """For each file a key that is the same for files with the same bytes.

    Only files that share their size with another are read. A file that is missing or
    empty holds no picture and counts as different from all.
    """
    sizes = [os.path.getsize(f) if os.path.exists(f) else -1 for f in files]
    count = Counter(sizes)

    def key(i: int) -> str:
        if sizes[i] <= 0 or count[sizes[i]] == 1:
            return f"{sizes[i]} {files[i]}"
        try:
            with open(files[i], "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return files[i]

    with ThreadPoolExecutor() as pool:
        return list(pool.map(key, range(len(files))))


def find_images(folders: Iterable[str]) -> dict[str, str]:
    """Name without ending -> path, of every image in the folders; .jpg goes first."""
    found: dict[str, str] = {}
    for folder in folders:
        present = list_files(folder)
        for ending in _ENDINGS:
            for name in sorted(present):
                stem, end = os.path.splitext(name)
                if end.lower() == ending:
                    found.setdefault(stem, os.path.join(folder, name))
    return found


def list_files(folder: str) -> set[str]:
    """The names of the files in a folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {
                entry.name
                for entry in entries
                if entry.is_file() and not entry.name.startswith("._")  # of macOS
            }
    except (OSError, ValueError):
        return set()


def read_text(path: str, hint: str) -> str:
    """A UTF-8 text file; `hint` says what to do where it is missing.

    Raises UserError where it is missing, is no text or cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{_short(path)}: no such file; {hint}") from None
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{_short(path)}: cannot be opened ({reason})") from None
    except ValueError as error:  # not UTF-8; a path with a zero byte
        raise UserError(
            f"{_short(path)}: cannot be read as UTF-8 text ({error})"
        ) from None


def read_lines(path: str, hint: str) -> list[tuple[int, str]]:
    """(line number from 1, stripped line) of each line that is not empty.

    Raises UserError as `read_text`, and where there is no such line.
    """
    text = read_text(path, hint)
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1)]
    lines = [(n, line) for n, line in lines if line]
    if not lines:
        raise UserError(f"{path}: is empty")
    return lines


def read_json(path: str, hint: str) -> Any:
    """The content of a JSON file; UserError as `read_text`, or not JSON."""
    text = read_text(path, hint)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None


def class_names_of(path: str) -> list[str]:
    """The names in a text file, one a line, in its order; UserError on a repetition."""
    lines = read_lines(path, "data.classes names a text file with a class a line")
    seen: dict[str, int] = {}
    for number, name in lines:
        if name in seen:
            raise UserError(
                f"{path}, line {number}: class {quoted(name)} stands in line "
                f"{seen[name]} too: list each once"
            )
        seen[name] = number
    return list(seen)


def check_same_classes(data_config: ConfigDict, sources: dict[str, Source]) -> None:
    """Raises UserError where train and val differ in their classes."""
    train, val = sources["train"].class_names, sources["val"].class_names
    if train != val:
        if not (only := sorted(set(train) ^ set(val))):
            raise UserError(
                f"{data_config.train} and {data_config.val} have the same classes in "
                "different orders (numbers in one, text in the other): write them alike"
            )
        where = data_config.train if only[0] in train else data_config.val
        raise UserError(
            f"{data_config.train} and {data_config.val} differ in their classes "
            f"({len(only)} are in one only, such as {quoted(only[0])} in {where}): "
            "list the same classes in both"
        )


def quoted(text: str) -> str:
    """A text of a user's file for a message: on one line, its middle left out if it is
    long."""
    whole = repr(text)
    return whole if len(whole) <= 200 else f"{whole[:90]} ... {whole[-100:]}"


def shown(value: object) -> str:
    """A piece of a user's file for a message: short, on one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text[:100]


def _short(path: str) -> str:
    """A path for a message; a part of it may come from a damaged file."""
    return path if len(path) <= 500 else quoted(path)


def _encoded(file: str) -> bytes | None:
    """The path as the file system takes it; None where no file can be called so."""
    try:
        encoded = os.fsencode(file)
    except UnicodeEncodeError:
        return None
    return None if b"\0" in encoded else encoded


def _are_there(files: Sequence[str]) -> np.ndarray:
    """bool [num_files]."""
    # One listing a folder: asking for every file takes minutes on a network disk.
    listed: dict[str, set[str]] = {}
    there = np.zeros(len(files), bool)
    for i, file in enumerate(files):
        folder, base = os.path.split(file)
        if folder not in listed:
            listed[folder] = list_files(folder)
        # A listing can spell a name otherwise than the file system takes it (macOS).
        there[i] = base in listed[folder] or os.path.isfile(file)
    return there
