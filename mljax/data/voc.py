"""PASCAL VOC as it is published: an XML file for each image, lists of images.

    root/ImageSets/Main/trainval.txt   data.train: "trainval"
    root/Annotations/000005.xml        <object><name>, <difficult>
    root/JPEGImages/000005.jpg         data.train_images, data.val_images ("" = here)

`root` is VOCdevkit/VOC2007 (train and test of it unpacked into one folder) or a tree of
the same form. The labels are the 20 of VOC where no other occurs, else those that occur
in the two sets; data.classes names a file that lists them.

data.difficult says what becomes of a label whose objects in an image are all marked
difficult: "positive" (the default: so do the files of arXiv 2209.06585), "ignored"
(unknown, -1: so does the evaluation of VOC) or "negative".
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mljax.data import files
from mljax.data.source import Source
from mljax.errors import UserError

CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
_DIFFICULT = {"positive": 1, "negative": 0, "ignored": -1}


class _Annotation(NamedTuple):
    name: str
    path: str
    objects: list[tuple[str, bool]]  # name, is difficult


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The image sets data.train and data.val of the tree data.root.

    Raises UserError where a file is missing or wrong.
    """
    del seed
    annotations = {split: _read(data_config, split) for split in ("train", "val")}
    class_names = _class_names(data_config, annotations)
    return {
        split: _source(data_config, split, read, class_names)
        for split, read in annotations.items()
    }


def _read(data_config: ConfigDict, split: str) -> list[_Annotation]:
    file = _set_file(data_config, split)
    hint = (
        'data.train and data.val name image sets, such as "trainval"; data.root is the '
        "folder that holds ImageSets, Annotations and JPEGImages"
    )
    found = []
    for number, name in files.read_lines(file, hint):
        path = os.path.join(data_config.root, "Annotations", f"{name}.xml")
        try:
            root = ElementTree.parse(path).getroot()
        except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{file}, line {number}: {files.quoted(path)} cannot be read ({reason})"
            ) from None
        found.append(_Annotation(name, path, _objects(path, root)))
    return found


def _set_file(data_config: ConfigDict, split: str) -> str:
    name = f"{data_config[split].removesuffix('.txt')}.txt"
    return os.path.join(data_config.root, "ImageSets", "Main", name)


def _objects(path: str, root: ElementTree.Element) -> list[tuple[str, bool]]:
    if root.tag != "annotation":
        raise UserError(
            f"{files.quoted(path)}: must be an <annotation>, found "
            f"{files.quoted(root.tag)}"
        )
    found = []
    # Only direct children: a part of an object has a name too.
    for place, element in enumerate(root.findall("object")):
        name = (element.findtext("name") or "").strip()
        difficult = (element.findtext("difficult") or "0").strip()
        if not name:
            raise UserError(f"{files.quoted(path)}: object {place} has no <name>")
        if difficult not in ("0", "1"):
            raise UserError(
                f"{files.quoted(path)}: object {place}: <difficult> must be 0 or 1, "
                f"found {files.quoted(difficult)}"
            )
        found.append((name, difficult == "1"))
    return found


def _class_names(
    data_config: ConfigDict, annotations: dict[str, list[_Annotation]]
) -> list[str]:
    where = {
        name: annotation.path
        for read in annotations.values()
        for annotation in read
        for name, _ in annotation.objects
    }
    if data_config.classes:
        file = os.path.join(data_config.root, data_config.classes)
        listed = sorted(files.class_names_of(file))
        if other := sorted(where.keys() - set(listed)):
            raise UserError(
                f"{files.quoted(where[other[0]])}: class {files.quoted(other[0])} is "
                f"not in {file} ({len(other)} such classes): add it there or correct it"
            )
        return listed
    if not where:
        raise UserError(
            f"{data_config.root}: no annotation of {data_config.train} and "
            f"{data_config.val} has an object; data.classes names a list of the classes"
        )
    return CLASSES if where.keys() <= set(CLASSES) else sorted(where)


def _source(
    data_config: ConfigDict,
    split: str,
    annotations: Sequence[_Annotation],
    class_names: list[str],
) -> Source:
    column = {name: i for i, name in enumerate(class_names)}
    labels = np.zeros((len(annotations), len(class_names)), np.int8)
    objects = np.zeros(labels.shape, np.uint16)
    value = _DIFFICULT[data_config.difficult]
    only_difficult = 0
    for row, annotation in enumerate(annotations):
        easy = {name for name, is_difficult in annotation.objects if not is_difficult}
        labels[row, [column[name] for name in easy]] = 1
        for name, is_difficult in annotation.objects:
            objects[row, column[name]] += value == 1 or not is_difficult
        for name in {name for name, _ in annotation.objects} - easy:
            labels[row, column[name]] = value
            only_difficult += 1
    notes = []
    absent = [class_names[i] for i in np.flatnonzero((labels != 1).all(0))]
    if len(absent) > len(CLASSES) // 2 and class_names == CLASSES:
        notes.append(
            f"the classes are VOC's 20, {len(absent)} of which are in no image: "
            "data.classes names a list of your own"
        )
    if only_difficult:
        notes.append(
            f"{only_difficult} labels rest on objects marked difficult only: "
            f"{data_config.difficult} (data.difficult)"
        )
    given = data_config[f"{split}_images"] or "JPEGImages"
    folder = os.path.join(data_config.root, given)
    images = {
        os.path.join(part, name): file
        for part in {os.path.dirname(a.name) for a in annotations}
        for name, file in files.find_images([os.path.join(folder, part)]).items()
    }
    return files.from_files(
        _set_file(data_config, split),
        class_names=class_names,
        labels=labels,
        names=[a.name for a in annotations],
        files=[
            images.get(a.name, os.path.join(folder, f"{a.name}.jpg"))
            for a in annotations
        ],
        split=split,
        max_pixels=data_config.max_pixels,
        missing=files.missing_policy(data_config),
        folder=folder,
        objects=objects,
        notes=notes,
    )
