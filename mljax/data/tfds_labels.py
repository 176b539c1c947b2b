"""Which feature of a TensorFlow data set holds the labels, and its values as labels.

The list of what can be labels is in mljax/data/tfds.py.
"""

import os
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from mljax.data import files
from mljax.errors import UserError

# Kinds of labels, in the order of the list.
_SEQUENCE, _STATE, _GROUP, _TENSOR = "sequence", "state", "group", "tensor"
_FLOAT, _TEXT, _NUMBER, _SINGLE = "float", "text", "number", "single"
_SURE = (_SEQUENCE, _STATE, _GROUP, _TENSOR)
_STATES = {"positive": 1, "negative": 0, "uncertain": -1, "unmentioned": -1}


class Labels(NamedTuple):
    """The feature with the labels; no class names: those that occur in train."""

    key: str
    kind: str
    class_names: list[str]


def label_feature(
    data_config: ConfigDict, features: tfds.features.FeaturesDict
) -> Labels:
    """The feature data.tfds_labels, or the one that fits best.

    Raises UserError where there is none, or data.classes does not go with it.
    """
    name, found = data_config.tfds_name, label_features(features)
    if not found:
        raise UserError(
            f"{name} has no feature with labels (it has {', '.join(features)}): "
            "choose another data.tfds_name"
        )

    def called_so(key: str) -> bool:
        return key.rpartition("/")[2] in ("label", "labels")

    def misfit(key: str) -> tuple[int, bool]:
        kind, called = found[key][0], called_so(key)
        if kind == _SINGLE:
            return 2, not called
        return 0 if kind in _SURE else 1 if called else 3, not called

    key = data_config.tfds_labels or min(found, key=misfit)
    if key not in found:
        raise UserError(
            f"{name}: data.tfds_labels={key!r} is not one of its features with labels "
            f"({', '.join(found)})"
        )
    kind, class_names = found[key]
    if kind == _TEXT and not data_config.tfds_labels and not called_so(key):
        raise UserError(
            f"{name}: feature {key!r} holds texts, which can be labels or captions: "
            f"data.tfds_labels={key} reads them as labels"
        )
    without_names = {
        _STATE: f"a state of each class ({', '.join(class_names)})",
        _NUMBER: "numbers of classes (from 0)",
    }
    if kind in without_names and not data_config.classes:
        raise UserError(
            f"{name}: feature {key!r} holds {without_names[kind]} and not the names of "
            "the classes: list them in a file in data.root, in its order and one a "
            "line, and name the file with data.classes"
        )
    if data_config.classes:
        file = _classes_file(data_config)
        listed = files.class_names_of(file)
        if kind in (_STATE, _NUMBER, _TEXT):
            return Labels(key, kind, listed)
        has_names = kind not in (_TENSOR, _FLOAT)
        if has_names or len(listed) != len(class_names):
            raise UserError(
                f"{file} (data.classes): has {len(listed)} names, the "
                f"feature {key!r} of {name} has {len(class_names)} classes"
                + (", with names of their own" if has_names else "")
            )
        class_names = listed
    return Labels(key, kind, class_names)


def label_features(
    features: tfds.features.FeaturesDict,
) -> dict[str, tuple[str, list[str]]]:
    """Key -> (kind, class names) of every feature that can be labels, in the order of
    the list; a kind without class names of its own has none."""
    found, in_objects, groups, flat, single = {}, {}, {}, {}, {}
    for key, feature in features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, tfds.features.ClassLabel):
            if feature.num_classes:
                single[key] = _SINGLE, feature.names
        elif isinstance(inner, tfds.features.ClassLabel):
            if inner.num_classes:
                are_states = set(inner.names) <= _STATES.keys()
                found[key] = _STATE if are_states else _SEQUENCE, inner.names
        elif isinstance(inner, tfds.features.FeaturesDict):
            for part, label in inner.items():
                if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
                    in_objects[f"{key}/{part}"] = _SEQUENCE, label.names
        elif isinstance(feature, tfds.features.FeaturesDict):
            parts = feature.items()
            if parts and all(
                p.np_dtype == np.bool_ and p.shape == () for _, p in parts
            ):
                groups[key] = _GROUP, list(feature)
        elif (kind := _flat_kind(feature, inner)) is not None:
            count = feature.shape[0] if kind in (_TENSOR, _FLOAT) else 0
            flat[key] = kind, [str(i) for i in range(count)]
    in_order = (_TENSOR, _FLOAT, _TEXT, _NUMBER)
    ranked = sorted(flat.items(), key=lambda item: in_order.index(item[1][0]))
    return found | in_objects | groups | dict(ranked) | single


def _flat_kind(
    feature: tfds.features.FeatureConnector,
    inner: tfds.features.FeatureConnector | None,
) -> str | None:
    """The kind of a list of plain values; None: they cannot be labels."""
    plain = (tfds.features.Tensor, tfds.features.Scalar, tfds.features.Text)
    # Not isinstance: a box is a Tensor too.
    if type(inner or feature) not in plain or len(feature.shape) != 1:
        return None
    dtype, count = np.dtype(feature.np_dtype), feature.shape[0]
    if dtype == np.object_:
        return _TEXT
    is_whole = np.issubdtype(dtype, np.integer)
    if count is None:
        return _NUMBER if is_whole else None
    if not count:
        return None
    if is_whole or dtype == np.bool_:
        return _TENSOR
    return _FLOAT if np.issubdtype(dtype, np.floating) else None


class Rows:
    """The labels of the examples of a split, taken in one after the other."""

    def __init__(
        self,
        data_config: ConfigDict,
        split: str,
        labels: Labels,
        features: tfds.features.FeaturesDict,
    ):
        self._config, self._labels, self._features = data_config, labels, features
        self._where = f"{data_config.tfds_name}, data.{split}={data_config[split]!r}"
        key = labels.key
        self._unknown_key = "labels" if key == "labels_no_difficult" else None
        self._sure_key, self._absent_key = _looked_for(features, key, labels.kind)
        self._column = {name: i for i, name in enumerate(labels.class_names)}
        self._other: dict[str, int] = {}  # texts that are no class -> example
        self._rows: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._only_flags = True

    def keys(self) -> list[str]:
        """The features that `add` needs."""
        keys = (self._labels.key, self._unknown_key, self._sure_key, self._absent_key)
        return [key for key in keys if key]

    def add(self, example: dict[str, Any]) -> None:
        """Raises UserError for a value that is no label."""
        kind, key = self._labels.kind, self._labels.key
        if kind == _SEQUENCE:
            row = self._sequence(example)
        elif kind == _SINGLE:
            present = self._known(example, key)
            row = self._filled(0 if len(present) else -1)
            row[present] = 1
        elif kind == _TEXT:
            columns = self._texts(np.asarray(example[key]).tolist())
            row = self._filled(0)
            row[columns] = 1
        elif kind == _NUMBER:
            row = self._filled(0)
            row[self._numbers(np.asarray(example[key]))] = 1
        else:
            row = self._each(example).astype(np.int8)
        self._rows.append(row)

    def finish(self) -> tuple[list[str], np.ndarray, np.ndarray | None]:
        """Class names, labels int8 [num_images, num_classes] and, where a label stands
        once an object, how often it does, uint16 of that shape.

        Raises UserError for texts that are no class, for 0 and 1 that are no numbers of
        classes, and where there is no label at all.
        """
        key, kind = self._labels.key, self._labels.kind
        class_names = list(self._column)
        if self._other:
            self._raise_other()
        if not class_names:
            raise UserError(f"{self._where}: feature {key!r} holds no label")
        count = len(class_names)
        if kind == _NUMBER and self._only_flags and count > 2:
            raise UserError(
                f"{self._where}: feature {key!r} holds {count} times 0 or 1 in each "
                f"example, not numbers of {count} classes: prepare it as "
                f"Tensor(shape=({count},)), which is a number for each class"
            )
        labels = np.zeros((len(self._rows), count), np.int8)
        for i, row in enumerate(self._rows):
            labels[i, : len(row)] = row  # shorter: texts that occur later
        # Numbers stand for names that TFDS does not know; their order is the builder's,
        # which texts do not have.
        order = np.arange(count)
        if not all(n.isdecimal() for n in class_names):
            order = np.argsort(class_names)
        elif kind == _TEXT:
            order = np.argsort([int(n) for n in class_names], kind="stable")
        counts = np.stack(self._counts)[:, order] if self._counts else None
        return [class_names[i] for i in order], labels[:, order], counts

    def _filled(self, value: int) -> np.ndarray:
        return np.full(len(self._column), value, np.int8)

    def _at(self) -> str:
        """The example that is read, for messages."""
        key = self._labels.key
        return f"{self._where}: feature {key!r} of example {len(self._rows)}"

    def _sequence(self, example: dict[str, Any]) -> np.ndarray:
        row, key = self._filled(0), self._labels.key
        if self._unknown_key:
            row[self._known(example, self._unknown_key)] = -1
        present = self._known(example, key)
        if self._sure_key:
            is_there = _not_negative(example, self._sure_key) > 0
            row[:] = -1
            row[present[~is_there]] = 0
            present = present[is_there]
        elif self._absent_key:
            row[:] = -1
            row[self._known(example, self._absent_key)] = 0
        row[present] = 1
        if "/" in key:  # a label stands once an object
            each = np.bincount(present, minlength=len(row))
            self._counts.append(each.astype(np.uint16))
        return row

    def _known(self, example: dict[str, Any], key: str) -> np.ndarray:
        """The labels in an example but -1, with which TFDS says "not known"."""
        present = _not_negative(example, key)
        self._check_range(present)
        return present

    def _check_range(self, numbers: np.ndarray) -> None:
        count = len(self._column)
        wrong = numbers[(numbers < 0) | (numbers >= count)]
        if len(wrong):
            hint = " (data.classes)" if self._labels.kind == _NUMBER else ""
            raise UserError(
                f"{self._at()} has label {wrong[0]}, and there are {count} "
                f"classes{hint}, from 0 on: correct it, or name another feature with "
                "data.tfds_labels"
            )

    def _numbers(self, values: np.ndarray) -> np.ndarray:
        self._check_range(values)
        is_flags = len(values) == len(self._column) and (values <= 1).all()
        self._only_flags = self._only_flags and bool(is_flags)
        return values

    def _texts(self, values: list[bytes]) -> list[int]:
        """The columns of the texts; a new one where there are no classes as yet."""
        columns = []
        for value in values:
            text = value.decode(errors="surrogateescape")
            if not files.is_name(text):
                raise UserError(
                    f"{self._at()} has label {files.quoted(text)}, which is blank or "
                    "no text: correct it, or name another feature with data.tfds_labels"
                )
            if not self._labels.class_names:
                columns.append(self._column.setdefault(text, len(self._column)))
            elif text in self._column:
                columns.append(self._column[text])
            else:
                self._other.setdefault(text, len(self._rows))
        return columns

    def _raise_other(self) -> None:
        text, example = next(iter(self._other.items()))
        if self._config.classes:
            classes, hint = _classes_file(self._config), "add it there or correct it"
        else:
            classes = f"data.train={self._config.train!r}, whose labels are the classes"
            hint = (
                "correct it, or list all classes in a file in data.root and name it "
                "with data.classes"
            )
        raise UserError(
            f"{self._where}: feature {self._labels.key!r} of example {example} has "
            f"label {files.quoted(text)}, which is not in {classes} "
            f"({len(self._other)} such labels): {hint}"
        )

    def _each(self, example: dict[str, Any]) -> np.ndarray:
        """The labels of an example that has a value for each class: [num_classes]."""
        key, kind, class_names = self._labels
        if kind == _GROUP:
            return np.array([example[key][c] for c in class_names])
        values = np.asarray(example[key])
        if kind == _STATE:
            if len(values) != len(class_names):
                raise UserError(
                    f"{self._at()} has {len(values)} states, "
                    f"and data.classes names {len(class_names)} classes"
                )
            names = self._features[key].feature.names
            # The last is for -1, which TFDS writes for a state that it does not know.
            return np.array([*(_STATES[state] for state in names), -1])[values]
        wrong = values[(values != 0) & (values != 1) & (values != -1)]
        if len(wrong):
            raise UserError(
                f"{self._at()} must hold 0, 1 and -1 (unknown), found {wrong[0]!s}: "
                "name another with data.tfds_labels"
            )
        return values


def _looked_for(
    features: tfds.features.FeaturesDict, key: str, kind: str
) -> tuple[str | None, str | None]:
    """The features beside labels of objects that say what is not there, if any.

    Returns:
        how sure each object is, 0 where its label was looked for and is not there
        (open_images_v4); the labels that were looked for and are not there (lvis).
    """
    outer, _, inner = key.partition("/")
    if kind != _SEQUENCE or not inner:
        return None, None
    is_sure = "confidence" in features[outer].feature
    absent = "neg_category_ids"
    return f"{outer}/confidence" if is_sure else None, (
        absent if absent in features else None
    )


def _not_negative(example: dict[str, Any], key: str) -> np.ndarray:
    """The numbers in an example that are not negative: [n]."""
    outer, _, inner = key.partition("/")
    numbers = np.atleast_1d(example[key] if key in example else example[outer][inner])
    return numbers[numbers >= 0]


def _classes_file(data_config: ConfigDict) -> str:
    return os.path.join(data_config.root, data_config.classes)
