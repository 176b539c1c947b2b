"""NUS-WIDE as it is published: text files of the same order, one for each concept.

    root/ImageList/TrainImagelist.txt                              actor\\0001_2124.jpg
    root/Groundtruth/TrainTestLabels/Labels_airport_Train.txt      0 or 1 a line
    root/Concepts81.txt or root/ConceptsList/Concepts81.txt        airport
    root/Flickr/actor/0001_2124.jpg      data.train_images, data.val_images

data.train and data.val are the parts, "Train" (161,789 images) and "Test" (107,859).
The images were left on Flickr and many are gone: data.drop_missing trains on the rest.
They may also lie in one folder without the subfolders.
"""

import os

import numpy as np
from ml_collections import ConfigDict

from mljax.data import files
from mljax.data.source import Source
from mljax.errors import UserError

_CONCEPTS = ("Concepts81.txt", os.path.join("ConceptsList", "Concepts81.txt"))


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The parts data.train and data.val of the tree data.root.

    Raises UserError where a file is missing or wrong.
    """
    del seed
    concepts = _concepts(data_config.root)
    return {s: _read(data_config, s, concepts) for s in ("train", "val")}


def _concepts(root: str) -> list[str]:
    """Sorted by name."""
    for place in _CONCEPTS:
        file = os.path.join(root, place)
        if os.path.isfile(file):
            return sorted(files.class_names_of(file))
    raise UserError(
        f"{os.path.join(root, _CONCEPTS[0])}: no such file; data.root is the folder "
        "that holds Concepts81.txt, ImageList and Groundtruth"
    )


def _read(data_config: ConfigDict, split: str, concepts: list[str]) -> Source:
    root, part = data_config.root, data_config[split]
    path = os.path.join(root, "ImageList", f"{part}Imagelist.txt")
    lines = files.read_lines(path, 'data.train and data.val are "Train" and "Test"')
    # The list was written on Windows.
    names = [line.replace("\\", "/") for _, line in lines]
    labels = np.zeros((len(names), len(concepts)), np.int8)
    for column, concept in enumerate(concepts):
        file = os.path.join(
            root, "Groundtruth", "TrainTestLabels", f"Labels_{concept}_{part}.txt"
        )
        labels[:, column] = _column(file, len(names), path)
    folder = os.path.join(root, data_config[f"{split}_images"] or "Flickr")
    flat = files.list_files(folder)
    return files.from_files(
        path,
        class_names=concepts,
        labels=labels,
        names=names,
        files=[_file(folder, name, flat) for name in names],
        split=split,
        max_pixels=data_config.max_pixels,
        missing=files.missing_policy(data_config),
        folder=folder,
    )


def _file(folder: str, name: str, flat: set[str]) -> str:
    base = os.path.basename(name)
    return os.path.join(folder, base if base in flat else name)


def _column(file: str, count: int, listed_in: str) -> np.ndarray:
    """The labels of one concept: int8 [count]."""
    text = files.read_text(file, "data.root holds Groundtruth/TrainTestLabels")
    cells = text.split()
    if len(cells) != count:
        raise UserError(
            f"{file}: has {len(cells)} labels for the {count} images of {listed_in}"
        )
    if not set(cells) <= {"0", "1"}:
        numbered = (
            (n, c) for n, t in enumerate(text.split("\n"), 1) for c in t.split()
        )
        number, cell = next(entry for entry in numbered if entry[1] not in ("0", "1"))
        raise UserError(
            f"{file}, line {number}: must be 0 or 1, found {files.quoted(cell)}"
        )
    return np.frombuffer("".join(cells).encode(), np.int8) - np.int8(ord("0"))
