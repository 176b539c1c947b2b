"""The same small data set in the layout of every source that reads files.

`write(name, root, train, val)` draws it: labels are int8 [num_images, 3] in {1, 0, -1}
for the classes ant, bee and cat; image i of a split is grey level i. The names have
spaces and letters beyond ASCII, except where a layout has none.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from data_trees import data_config, encode, write_json
from ml_collections import ConfigDict

from mljax import config as configs
from mljax.data import DATASETS
from mljax.data.source import Sources

CLASSES = ["ant", "bee", "cat"]
Labels = dict[str, np.ndarray]

TRAIN = np.array(
    [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 1]], np.int8
)
VAL = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 0]], np.int8)
# The same with some labels that nobody looked at.
TRAIN_UNKNOWN = np.where([[0, 0, 1], *[[0] * 3] * 4, [0, 1, 0]], np.int8(-1), TRAIN)
VAL_UNKNOWN = np.where([[1, 0, 0], [0, 0, 0], [0, 0, 1]], np.int8(-1), VAL)


def _images(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        # PNG whatever the name says: the content decides.
        file.write_bytes(encode(grey(i), "PNG"))


def grey(level: int) -> np.ndarray:
    return np.full((16, 16, 3), level, np.uint8)


def _picked(row: np.ndarray, value: int) -> list[str]:
    return [name for name, v in zip(CLASSES, row, strict=True) if v == value]


def annotations(root: Path, tables: Labels) -> ConfigDict:
    for split, labels in tables.items():
        names = [f"{split} photos/é {i}.png" for i in range(len(labels))]
        _images(root, names)
        images = [
            [n, 2 * _picked(row, 1), _picked(row, -1)]
            for n, row in zip(names, labels, strict=True)
        ]
        write_json(root / f"{split}.json", CLASSES[::-1], images)
    return data_config(root)


def coco(root: Path, tables: Labels) -> ConfigDict:
    (root / "annotations").mkdir()
    ids = {"ant": 90, "bee": 1, "cat": 17}  # with gaps, and not in the order of names
    for split, labels in tables.items():
        names = [f"COCO {split}2014 ü{i}.jpg" for i in range(len(labels))]
        _images(root / f"{split}2014", names)
        objects = [
            {"id": 7, "image_id": 100 + i, "category_id": ids[name], "iscrowd": crowd}
            for i, row in enumerate(labels)
            for name in _picked(row, 1)
            for crowd in (0, 1)[: 1 + (name == "cat")]
        ]
        content = {
            "info": {},
            "images": [{"id": 100 + i, "file_name": n} for i, n in enumerate(names)],
            "annotations": objects,
            "categories": [{"id": i, "name": n} for n, i in ids.items()],
        }
        file = root / f"annotations/instances_{split}2014.json"
        file.write_text(json.dumps(content))
    return data_config(
        root,
        name="coco",
        train="annotations/instances_train2014.json",
        val="annotations/instances_val2014.json",
    )


def voc(root: Path, tables: Labels) -> ConfigDict:
    """-1 is a class whose objects are all marked difficult."""
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for split, labels in tables.items():
        names = [f"{split} ñ{i:03}" for i in range(len(labels))]
        _images(root / "JPEGImages", [f"{name}.jpg" for name in names])
        for name, row in zip(names, labels, strict=True):
            objects = [(c, 1) for c in _picked(row, -1) + _picked(row, 1)]
            objects += [(c, 0) for c in _picked(row, 1)]
            (root / f"Annotations/{name}.xml").write_text(voc_xml(name, objects))
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
    return data_config(root, name="voc", train="train", val="val", difficult="ignored")


def voc_xml(name: str, objects: list[tuple[str, int]]) -> str:
    parts = [
        f"<object><name>{c}</name><difficult>{d}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        "<part><name>head</name></part></object>"
        for c, d in objects
    ]
    head = f"<filename>{name}.jpg</filename><size><width>16</width></size>"
    return f"<annotation>{head}{''.join(parts)}</annotation>"


def table(root: Path, tables: Labels) -> ConfigDict:
    for split, labels in tables.items():
        names = [f"photos/{split}, ö {i}.png" for i in range(len(labels))]
        _images(root, names)
        lines = [
            f'"{n}",' + ",".join("" if v == 0 else str(v) for v in row[::-1])
            for n, row in zip(names, labels, strict=True)
        ]
        text = "image," + ",".join(CLASSES[::-1]) + "\n" + "\n".join(lines)
        (root / f"{split}.csv").write_text(text)
    return data_config(root, name="table", train="train.csv", val="val.csv")


def lists(root: Path, tables: Labels) -> ConfigDict:
    """A table with lists, both splits in one file."""
    lines = ["path\tlabels\tnobody looked\tpart"]
    for split, labels in tables.items():
        names = [f"{split} å {i}.png" for i in range(len(labels))]
        _images(root / "photos", names)
        for name, row in zip(names, labels, strict=True):
            found = [";".join(2 * _picked(row, 1)), str(_picked(row, -1))]
            lines.append("\t".join([name, *found, split]))
    (root / "all.tsv").write_text("\n".join(lines) + "\n")
    config = data_config(root, name="table", train="train", val="val")
    config.train_images = config.val_images = "photos"
    config.table.update(file="all.tsv", split="part", delimiter="tab", image="path")
    config.table.update(labels="labels", unknown="nobody looked")
    return config


def nuswide(root: Path, tables: Labels) -> ConfigDict:
    labels_folder = root / "Groundtruth/TrainTestLabels"
    labels_folder.mkdir(parents=True)
    (root / "ImageList").mkdir()
    (root / "Concepts81.txt").write_text("\n".join(CLASSES[::-1]) + "\n")
    for split, labels in tables.items():
        part = {"train": "Train", "val": "Test"}[split]
        names = [f"{split}er\\{i:04}_21244.jpg" for i in range(len(labels))]
        _images(root / "Flickr", [name.replace("\\", "/") for name in names])
        file = root / f"ImageList/{part}Imagelist.txt"
        file.write_text("\r\n".join(names) + "\r\n")
        for column, concept in enumerate(CLASSES):
            lines = "".join(f"{v} \n" for v in labels[:, column])
            (labels_folder / f"Labels_{concept}_{part}.txt").write_text(lines)
    return data_config(root, name="nuswide", train="Train", val="Test")


def vg500(root: Path, tables: Labels) -> ConfigDict:
    index: dict[str, list[int]] = {}
    for split, labels in tables.items():
        part = {"train": "train", "val": "test"}[split]
        names = [f"{split}23437{i}.jpg" for i in range(len(labels))]
        for i, name in enumerate(names):
            folder = root / ("VG_100K_2" if i % 2 else "VG_100K")
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(encode(grey(i), "PNG"))
        (root / f"{part}_list_500.txt").write_text("\n".join(names))
        index |= {
            name: np.flatnonzero(row == 1).tolist()
            for name, row in zip(names, labels, strict=True)
        }
    (root / "vg_category_500_labels_index.json").write_text(json.dumps(index))
    (root / "names.txt").write_text("\n".join(CLASSES))
    config = data_config(root, name="vg500", classes="names.txt")
    config.train, config.val = "train_list_500.txt", "test_list_500.txt"
    return config


WRITERS: dict[str, Callable[[Path, Labels], ConfigDict]] = {
    f.__name__: f for f in (annotations, coco, voc, table, lists, nuswide, vg500)
}
# Those that can say that a label is unknown.
WITH_UNKNOWN = ["annotations", "voc", "table", "lists"]


def write(
    name: str, root: Path, train: np.ndarray = TRAIN, val: np.ndarray = VAL
) -> ConfigDict:
    """Draws the tree into `root`, an empty folder; gives the config that reads it."""
    return WRITERS[name](root, {"train": train, "val": val})


def load(config: ConfigDict) -> Sources:
    """What training makes of `config.data`."""
    whole = configs.common()
    whole.data = config
    configs.validate(whole)
    return DATASETS[config.name](config, 0)
