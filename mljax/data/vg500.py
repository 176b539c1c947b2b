"""Visual Genome with 500 labels, as published with SSGRL (Chen et al. 2019).

    root/train_list_500.txt                   data.train: an image file name a line
    root/test_list_500.txt                    data.val
    root/vg_category_500_labels_index.json    {"2343728.jpg": [3, 27], ...}
    root/VG_100K/, root/VG_100K_2/            data.train_images, data.val_images

The labels are numbers, sorted by value: those that occur in the index, 0 to 499. An
image may have none (a negative for all). data.classes names a file with a name for each
number, in their order. data.train_images may list several folders between commas.
"""

import os

import numpy as np
from ml_collections import ConfigDict

from mljax.data import files
from mljax.data.source import Source
from mljax.errors import UserError

INDEX = "vg_category_500_labels_index.json"
_FOLDERS = "VG_100K,VG_100K_2"


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The lists data.train and data.val in data.root.

    Raises UserError where a file is missing or wrong.
    """
    del seed
    path = os.path.join(data_config.root, INDEX)
    index = _index(path)
    numbers = sorted({label for labels in index.values() for label in labels})
    class_names = [str(number) for number in numbers]
    if data_config.classes:
        file = os.path.join(data_config.root, data_config.classes)
        names = files.class_names_of(file)
        if numbers[-1] >= len(names):
            raise UserError(
                f"{file}: names {len(names)} classes, but {path} has the label "
                f"{numbers[-1]} (they are counted from 0)"
            )
        numbers, class_names = list(range(len(names))), names
    column = {number: i for i, number in enumerate(numbers)}
    return {
        split: _read(data_config, split, index, column, class_names)
        for split in ("train", "val")
    }


def _index(path: str) -> dict[str, list[int]]:
    content = files.read_json(path, f"data.root is the folder that holds {INDEX}")
    if not isinstance(content, dict):
        raise UserError(f'{path}: must be an object, {{"IMAGE.jpg": [labels], ...}}')
    any_label = False
    for name, labels in content.items():
        if not isinstance(labels, list) or not all(
            type(label) is int and 0 <= label < 10**6 for label in labels
        ):
            raise UserError(
                f"{path}: image {files.quoted(name)} must have a list of numbers from "
                f"0 on, found {files.shown(labels)}"
            )
        any_label |= bool(labels)
    if not any_label:
        raise UserError(f"{path}: no image has a label")
    return content


def _read(
    data_config: ConfigDict,
    split: str,
    index: dict[str, list[int]],
    column: dict[int, int],
    class_names: list[str],
) -> Source:
    path = os.path.join(data_config.root, data_config[split])
    lines = files.read_lines(
        path, "data.train and data.val name lists such as train_list_500.txt"
    )
    unknown = [(number, name) for number, name in lines if name not in index]
    if unknown:
        number, name = unknown[0]
        raise UserError(
            f"{path}, line {number}: image {files.quoted(name)} is not in {INDEX} "
            f"({len(unknown)} such images)"
        )
    names = [name for _, name in lines]
    labels = np.zeros((len(names), len(class_names)), np.int8)
    for row, name in enumerate(names):
        labels[row, [column[label] for label in index[name]]] = 1
    given = data_config[f"{split}_images"] or _FOLDERS
    folders = [os.path.join(data_config.root, f.strip()) for f in given.split(",")]
    listed = [(folder, files.list_files(folder)) for folder in folders]

    def file(name: str) -> str:
        home = next((folder for folder, there in listed if name in there), folders[0])
        return os.path.join(home, name)

    return files.from_files(
        path,
        class_names=class_names,
        labels=labels,
        names=names,
        files=[file(name) for name in names],
        split=split,
        max_pixels=data_config.max_pixels,
        missing=files.missing_policy(data_config),
        folder=", ".join(folders),
    )
