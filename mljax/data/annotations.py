"""Images on disk with their labels in a JSON file.

    {"classes": ["cat", "dog", "sofa"],
     "images": [["photos/1.jpg", ["cat", "sofa"]],
                ["photos/2.jpg", []],
                ["photos/3.jpg", ["dog", "dog"], ["cat"]]]}

Paths are relative to the file. A label may stand several times (one per object) and
is one positive. An image without labels is a negative for all classes. Labels in the
optional third list are unknown (-1) unless they are in the second too: "nobody has
looked" rather than "not there". Classes are all strings (sorted by name) or all
integers (sorted by value), and the same in both files.
"""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mljax.data.decode import decode
from mljax.data.source import Source
from mljax.errors import UserError


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The files data.root/data.train and data.root/data.val as sources.

    Raises UserError where a file is missing or wrong, and where the two files differ in
    their classes.
    """
    del seed
    sources = {}
    for split in ("train", "val"):
        path = os.path.join(data_config.root, data_config[split])
        sources[split] = read(path, split, data_config.max_pixels)
    train, val = sources["train"].class_names, sources["val"].class_names
    if train != val:
        only = sorted(set(train) ^ set(val))
        where = data_config.train if only[0] in train else data_config.val
        raise UserError(
            f"{data_config.train} and {data_config.val} differ in their classes "
            f"({len(only)} are in one only, such as {only[0]!r} in {where}): list the "
            "same classes in both"
        )
    return sources


def read(path: str | os.PathLike, split: str, max_pixels: int) -> Source:
    """One annotation file as a source. Raises UserError, see the top of this file."""
    path = os.fspath(path)
    classes, images = _parse(path)
    labels = _labels(path, classes, images)
    names = [image[0] for image in images]
    files = [os.path.join(os.path.dirname(path), name) for name in names]
    _check_files(path, names, files)
    encoded = tf.constant([os.fsencode(file) for file in files])

    def read_image(index: tf.Tensor) -> tf.Tensor:
        return decode(tf.io.read_file(tf.gather(encoded, index)), max_pixels)

    return Source(
        class_names=[str(c) for c in classes],
        labels=labels,
        names=files,
        read=read_image,
        split=split,
        content=lambda: content_keys(files),
    )


def content_keys(files: list[str]) -> list[str]:
    """For each file a key that is the same for files with the same bytes.

    Only files that share their size with another are read. A missing file counts as
    different from all.
    """
    sizes = [os.path.getsize(f) if os.path.exists(f) else -1 for f in files]
    count = Counter(sizes)

    def key(i: int) -> str:
        if sizes[i] < 0 or count[sizes[i]] == 1:
            return f"{sizes[i]} {files[i]}"
        try:
            with open(files[i], "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return files[i]

    with ThreadPoolExecutor() as pool:
        return list(pool.map(key, range(len(files))))


def _parse(path: str) -> tuple[list, list]:
    """The sorted classes and the images of a file, with every form checked."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such annotation file; set data.root to its folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None

    if not isinstance(content, dict) or not {"classes", "images"} <= content.keys():
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path}: needs an object with the keys 'classes' and 'images', found "
            f"{str(found)[:200]}"
        )
    classes, images = content["classes"], content["images"]
    if not isinstance(classes, list) or {type(c) for c in classes} not in (
        {str},
        {int},
    ):
        raise UserError(
            f"{path}: 'classes' must be a list of names (all strings or all integers)"
        )
    repeated = [c for c, n in Counter(classes).items() if n > 1]
    if repeated:
        raise UserError(
            f"{path}: class {repeated[0]!r} is listed more than once in 'classes' "
            f"({len(repeated)} such classes): list each once"
        )
    if not isinstance(images, list) or not images:
        raise UserError(f"{path}: 'images' must be a list of at least one image")
    for position, image in enumerate(images):
        if not _is_entry(image):
            raise UserError(
                f'{path}: image {position} must be ["path", [labels]] or ["path", '
                f"[labels], [unknown labels]], found {json.dumps(image)[:100]}"
            )
    return sorted(classes), images


def _is_entry(image: object) -> bool:
    return (
        isinstance(image, list)
        and len(image) in (2, 3)
        and isinstance(image[0], str)
        and all(isinstance(labels, list) for labels in image[1:])
    )


def _labels(path: str, classes: list, images: list) -> np.ndarray:
    """int8 [num_images, num_classes]: 1 in the second list, -1 in the third, else 0."""
    # The type is part of the key: to Python, True and 1.0 equal the integer 1.
    column = {(type(c), c): i for i, c in enumerate(classes)}
    labels = np.zeros((len(images), len(classes)), np.int8)
    wrong = []
    for row, image in enumerate(images):
        # Positives last: they win over unknown.
        for value, listed in ((-1, image[2] if len(image) == 3 else []), (1, image[1])):
            for label in listed:
                try:
                    labels[row, column[type(label), label]] = value
                except (KeyError, TypeError):  # TypeError: a list or an object
                    wrong.append((label, image[0]))
    if wrong:
        label, name = wrong[0]
        raise UserError(
            f"{path}: label {json.dumps(label)[:100]} of image {name!r} is not in "
            f"'classes' ({len(wrong)} such labels): add it there or correct it"
        )
    return labels


def _check_files(path: str, names: list[str], files: list[str]) -> None:
    # One listing a folder: asking for every file takes minutes on a network disk.
    present: dict[str, set[str]] = {}
    missing = []
    for name, file in zip(names, files, strict=True):
        folder, base = os.path.split(file)
        if folder not in present:
            present[folder] = _list_files(folder)
        # A listing can spell a name otherwise than the file system takes it (macOS).
        if base not in present[folder] and not os.path.isfile(file):
            missing.append(name)
    if missing:
        raise UserError(
            f"{path}: image file {missing[0]!r} is missing ({len(missing)} of "
            f"{len(names)} are); paths are relative to {os.path.dirname(path) or '.'}"
        )


def _list_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()
