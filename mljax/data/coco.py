"""MS-COCO as it is published: an instances JSON file and a folder of images.

    root/annotations/instances_train2014.json       data.train
    root/train2014/COCO_train2014_000000000009.jpg  data.train_images ("" = this place)

Any file of that form works: "categories" (id, name), "images" (id, file_name) and
"annotations" (image_id, category_id). Labels are the categories, sorted by name as in
every source; ids need not be contiguous. An object marked `iscrowd` counts as any
other. An image without annotations is a negative for all labels (data.drop_unlabelled
leaves it out: of the 40,504 of val2014 40,137 stay).
"""

import os
from collections.abc import Hashable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mljax.data import files
from mljax.data.source import Source
from mljax.errors import UserError

_HINT = (
    "data.train and data.val name instances files in data.root, such as "
    "annotations/instances_train2014.json"
)


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The instances files data.train and data.val, relative to data.root.

    Raises UserError where a file is missing or wrong, and where the two files differ in
    their categories.
    """
    del seed
    sources = {split: _read(data_config, split) for split in ("train", "val")}
    files.check_same_classes(data_config, sources)
    return sources


def _read(data_config: ConfigDict, split: str) -> Source:
    path = os.path.join(data_config.root, data_config[split])
    content = files.read_json(path, _HINT)
    tables = {}
    for key, needed in (
        ("categories", ("id", "name")),
        ("images", ("id", "file_name")),
        ("annotations", ("image_id", "category_id")),
    ):
        tables[key] = _table(path, content, key, needed)
    categories, images = tables["categories"], tables["images"]
    for key in ("categories", "images"):
        if not tables[key]:
            raise UserError(f"{path}: {key!r} is empty")
    for key, name in (("categories", "name"), ("images", "file_name")):
        for place, entry in enumerate(tables[key]):
            if not isinstance(entry[name], str) or not files.is_name(entry[name]):
                raise UserError(
                    f"{path}: {key}[{place}]: {name!r} must be a text, found "
                    f"{files.shown(entry[name])}"
                )
    _unique(path, categories, "categories", "name")
    ids = _unique(path, categories, "categories", "id")
    names = [category["name"] for category in categories]
    order = sorted(range(len(names)), key=names.__getitem__)
    column_of = {place: column for column, place in enumerate(order)}
    columns = {value: column_of[place] for value, place in ids.items()}
    rows = _unique(path, images, "images", "id")

    labels = np.zeros((len(images), len(names)), np.int8)
    objects = np.zeros(labels.shape, np.uint16)
    wrong = []
    for place, entry in enumerate(tables["annotations"]):
        row = _find(rows, entry["image_id"])
        column = _find(columns, entry["category_id"])
        if row is None or column is None:
            key = "image_id" if row is None else "category_id"
            wrong.append((place, key, entry[key]))
            continue
        labels[row, column] = 1
        objects[row, column] += 1
    if wrong:
        place, key, value = wrong[0]
        listed = "images" if key == "image_id" else "categories"
        raise UserError(
            f"{path}: annotations[{place}]: {key} {files.shown(value)} is not in "
            f"{listed!r} ({len(wrong)} such annotations)"
        )
    folder = _image_folder(data_config, split)
    return files.from_files(
        path,
        class_names=[names[place] for place in order],
        labels=labels,
        names=[image["file_name"] for image in images],
        files=[os.path.join(folder, image["file_name"]) for image in images],
        split=split,
        max_pixels=data_config.max_pixels,
        missing=files.missing_policy(data_config),
        folder=folder,
        objects=objects,
    )


def _image_folder(data_config: ConfigDict, split: str) -> str:
    """data.train_images, else the folder that the name of the file speaks of."""
    root, given = data_config.root, data_config[f"{split}_images"]
    if given:
        return os.path.join(root, given)
    name = os.path.splitext(os.path.basename(data_config[split]))[0].split("_")[-1]
    # As published; as some tools arrange it.
    usual = [os.path.join(root, name), os.path.join(root, "images", name)]
    for folder in usual:
        if os.path.isdir(folder):
            return folder
    raise UserError(
        f"{usual[0]}: no such folder; name the images of {data_config[split]} with "
        f"data.{split}_images, relative to data.root"
    )


def _table(
    path: str, content: Any, key: str, needed: tuple[str, str]
) -> list[dict[str, Any]]:
    """A list of objects that have the needed keys."""
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(
            f"{path}: needs an object with the lists 'images', 'annotations' and "
            f"'categories'; there is no list {key!r}"
        )
    for place, entry in enumerate(content[key]):
        if not isinstance(entry, dict) or not all(k in entry for k in needed):
            raise UserError(
                f"{path}: {key}[{place}] must be an object with {needed[0]!r} and "
                f"{needed[1]!r}, found {files.shown(entry)}"
            )
    return content[key]


def _unique(
    path: str, table: list[dict[str, Any]], key: str, field: str
) -> dict[Hashable, int]:
    """Value of a field -> place in the table; each value once."""
    places: dict[Hashable, int] = {}
    for place, entry in enumerate(table):
        value = entry[field]
        if type(value) not in (int, str):
            raise UserError(
                f"{path}: {key}[{place}]: {field!r} must be a number or a text, found "
                f"{files.shown(value)}"
            )
        if value in places:
            raise UserError(
                f"{path}: {key}[{place}]: {field} {files.shown(value)} is that of "
                f"{key}[{places[value]}] too"
            )
        places[value] = place
    return places


def _find(places: dict[Hashable, int], value: Any) -> int | None:
    return places.get(value) if type(value) in (int, str) else None
