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

import os
from collections import Counter

import numpy as np
from ml_collections import ConfigDict

from mljax.data import files
from mljax.data.source import Source
from mljax.errors import UserError

# What lies in the folder of a data set as its makers publish it.
_PUBLISHED = {
    "annotations": "coco",
    "ImageSets": "voc",
    "ImageList": "nuswide",
    "train_list_500.txt": "vg500",
}


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The files data.root/data.train and data.root/data.val as sources.

    Raises UserError where a file is missing or wrong, and where the two files differ in
    their classes.
    """
    del seed
    missing = files.missing_policy(data_config)
    sources = {}
    for split in ("train", "val"):
        path = os.path.join(data_config.root, data_config[split])
        sources[split] = read(path, split, data_config.max_pixels, missing)
    files.check_same_classes(data_config, sources)
    return sources


def read(
    path: str | os.PathLike, split: str, max_pixels: int, missing: str = "stop"
) -> Source:
    """One annotation file as a source; `missing` as in `files.from_files`.

    Raises UserError, see the top of this file.
    """
    path = os.fspath(path)
    classes, images = _parse(path)
    labels, objects = _labels(path, classes, images)
    names = [image[0] for image in images]
    folder = os.path.dirname(path)
    return files.from_files(
        path,
        class_names=[str(c) for c in classes],
        labels=labels,
        names=names,
        files=[os.path.join(folder, name) for name in names],
        split=split,
        max_pixels=max_pixels,
        missing=missing,
        folder=folder,
        objects=objects,
    )


def _parse(path: str) -> tuple[list, list]:
    """The sorted classes and the images of a file, with every form checked."""
    advice = "set data.root to the folder of annotation files"
    folder = os.path.dirname(path)
    for name, kind in _PUBLISHED.items():
        if os.path.exists(os.path.join(folder, name)):
            config = f"--config configs/{kind}.py:original"
            advice += f", or name the set as published: {config}"
    content = files.read_json(path, advice)
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
    if unfit := [c for c in classes if not files.is_name(str(c))]:
        raise UserError(
            f"{path}: class {files.quoted(unfit[0])} in 'classes' is blank or no text: "
            "give it a name"
        )
    repeated = [c for c, n in Counter(classes).items() if n > 1]
    if repeated:
        raise UserError(
            f"{path}: class {files.quoted(repeated[0])} is listed more than once in "
            f"'classes' ({len(repeated)} such classes): list each once"
        )
    if not isinstance(images, list) or not images:
        raise UserError(f"{path}: 'images' must be a list of at least one image")
    for position, image in enumerate(images):
        if not _is_entry(image):
            raise UserError(
                f'{path}: image {position} must be ["path", [labels]] or ["path", '
                f"[labels], [unknown labels]], found {files.shown(image)}"
            )
    return sorted(classes), images


def _is_entry(image: object) -> bool:
    return (
        isinstance(image, list)
        and len(image) in (2, 3)
        and isinstance(image[0], str)
        and all(isinstance(labels, list) for labels in image[1:])
    )


def _labels(path: str, classes: list, images: list) -> tuple[np.ndarray, np.ndarray]:
    """Labels int8 [num_images, num_classes]: 1 in the second list, -1 in the third,
    else 0; and how often each stands in the second, uint16 of that shape."""
    # The type is part of the key: to Python, True and 1.0 equal the integer 1.
    column = {(type(c), c): i for i, c in enumerate(classes)}
    labels = np.zeros((len(images), len(classes)), np.int8)
    objects = np.zeros(labels.shape, np.uint16)
    wrong = []
    for row, image in enumerate(images):
        # Positives last: they win over unknown.
        for value, listed in ((-1, image[2] if len(image) == 3 else []), (1, image[1])):
            for label in listed:
                try:
                    place = row, column[type(label), label]
                    labels[place] = value
                    objects[place] += value == 1
                except (KeyError, TypeError):  # TypeError: a list or an object
                    wrong.append((label, image[0]))
    if wrong:
        label, name = wrong[0]
        raise UserError(
            f"{path}: label {files.shown(label)} of image {files.quoted(name)} is not "
            f"in 'classes' ({len(wrong)} such labels): add it there or correct it"
        )
    return labels, objects
