"""TensorFlow Datasets: any builder with an image and labels.

`data.tfds_name` is the builder ("voc/2007", "coco/2014"), `data.root` the data
directory of TFDS ("" for its own default), `data.train` and `data.val` are splits as
TFDS writes them ("train+validation", "test[:50%]"). Of the features, labels can be

    a sequence of class labels               "labels" of VOC
    a sequence of states, one a class        "label" of chexpert; data.classes names
      (positive, negative, uncertain,        the classes, which the builder does not;
      unmentioned)                           the last two are unknown (-1)
    a sequence of objects with one each      "objects/label" of COCO
    a group of truth values, one a class     "attributes" of celeb_a
    a tensor of 0, 1 and -1 (unknown), one   any [num_classes] of integers or truth
    number a class                           values; data.classes names the classes

One called "label" or "labels" is taken, else the first that fits in this order;
`data.tfds_labels` names another. With
"labels_no_difficult" of VOC a class that shows only in objects marked difficult is
unknown (-1), as in the VOC evaluation. In open_images_v4 ("objects/confidence" 0) and
lvis ("neg_category_ids") the data say what was looked for and is not there; all other
labels that an image does not have are unknown.

A data set is read once from end to end at the start: for its labels, and for where each
example lies in the files (TFRecord, what TFDS writes, or ArrayRecord), so that image i
is read when its turn comes. Of files of another format the encoded images are kept in
memory.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from mljax.data import files, tfds_files
from mljax.data.decode import decode, reason
from mljax.data.source import Source
from mljax.errors import UserError

_MEMORY_SHARE = 1 / 3  # of the machine's memory, for encoded images
# Kinds of labels.
_SEQUENCE, _STATE, _GROUP, _TENSOR = "sequence", "state", "group", "tensor"
_STATES = {"positive": 1, "negative": 0, "uncertain": -1, "unmentioned": -1}


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The splits data.train and data.val of the builder data.tfds_name.

    Never downloads. Raises UserError where the data set is not prepared, is damaged,
    has no fitting features or must be kept in the memory and is too large for it.
    """
    del seed
    builder = _builder(data_config.tfds_name, data_config.root)
    room = _Room(_memory() * _MEMORY_SHARE)
    return {
        split: _read_split(builder, data_config, split, room)
        for split in ("train", "val")
    }


def _builder(name: str, root: str) -> tfds.core.DatasetBuilder:
    if not name:
        raise UserError('data.tfds_name is empty: name a builder, such as "voc/2007"')
    try:
        return tfds.builder(name, data_dir=root or None, try_gcs=False)
    except Exception as error:  # TFDS has no common type for "no such data set"
        raise UserError(f"data.tfds_name={name!r}: {_first_line(error)}") from None


class _Room:
    """Bytes of memory that encoded images may still take, of all splits together."""

    def __init__(self, left: float):
        self.left = left

    def take(self, name: str, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{name}: the images do not fit in a third of the memory; prepare it "
                "as TFRecord files (tfds build --file_format=tfrecord), whose "
                "images are read when they are needed"
            )


def _read_split(
    builder: tfds.core.DatasetBuilder,
    data_config: ConfigDict,
    split: str,
    room: _Room,
) -> Source:
    name, max_pixels = data_config.tfds_name, data_config.max_pixels
    image_key = _image_feature(name, builder.info.features)
    label_key, kind, class_names = _label_feature(data_config, builder.info.features)
    unknown_key = "labels" if label_key == "labels_no_difficult" else None
    sure_key, absent_key = _looked_for(builder.info.features, label_key, kind)
    keys = [k for k in builder.info.features if k.endswith("filename")]
    name_key = keys[0] if keys else None

    encoded: list[bytes] = []
    names: list[str] = []
    rows: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    places: list[Any] = []
    wanted = [k for k in (label_key, unknown_key, sure_key, absent_key, name_key) if k]
    stored = tfds_files.stored(builder, data_config[split])
    found: Iterable[tuple[dict[str, Any], Any]]
    if stored is None:
        in_order = _examples(builder, data_config, split, image_key, wanted)
        found = ((example, None) for example in in_order)
    else:
        features = builder.info.features
        found = stored.examples(features, _partial(features, wanted))
    for example, place in found:
        row = np.zeros(len(class_names), np.int8)
        if unknown_key:
            row[_known(example, unknown_key)] = -1
        if kind == _SEQUENCE:
            present = _known(example, label_key)
            if sure_key:
                is_there = _known(example, sure_key) > 0
                row[:] = -1
                row[present[~is_there]] = 0
                present = present[is_there]
            elif absent_key:
                row[:] = -1
                row[_known(example, absent_key)] = 0
            row[present] = 1
            if "/" in label_key:  # a label stands once an object
                each = np.bincount(present, minlength=len(row))
                counts.append(each.astype(np.uint16))
        else:
            feature = builder.info.features[label_key]
            row[:] = _values(
                name, len(names), label_key, kind, class_names, feature, example
            )
        rows.append(row)
        names.append(
            example[name_key].decode() if name_key else f"{name} {split} {len(names)}"
        )
        if place is None:
            encoded.append(example[image_key])
            room.take(name, len(encoded[-1]))
        else:
            places.append(place)
    if not rows:
        raise UserError(f"{name}: data.{split}={data_config[split]!r} has no images")

    # Numbers stand for names that TFDS does not know; their order is the builder's.
    is_named = not all(n.isdigit() for n in class_names)
    order = np.argsort(class_names) if is_named else np.arange(len(class_names))
    if stored is None:
        tensor = tf.constant(encoded)
        del encoded

        def read_encoded(index: tf.Tensor) -> tf.Tensor:
            return tf.gather(tensor, index)
    else:
        read_encoded = stored.images(places, image_key)

    def content() -> list[bytes]:
        def key(i: int) -> bytes:
            return hashlib.sha256(read_encoded(tf.constant(i)).numpy()).digest()

        with ThreadPoolExecutor() as pool:
            return list(pool.map(key, range(len(names))))

    return Source(
        class_names=[class_names[i] for i in order],
        labels=np.stack(rows)[:, order],
        names=names,
        read=lambda index: decode(read_encoded(index), max_pixels),
        encoded=read_encoded,
        split=split,
        content=content,
        objects=np.stack(counts)[:, order] if counts else None,
    )


def _examples(
    builder: tfds.core.DatasetBuilder,
    data_config: ConfigDict,
    split: str,
    image_key: str,
    wanted: list[str],
) -> Iterable[dict[str, Any]]:
    """The examples of a split: the wanted features and the image's encoded bytes.

    Raises UserError where there is no such data set or split, or it is damaged.
    """
    name = data_config.tfds_name
    decoders = _partial(
        builder.info.features,
        [image_key, *wanted],
        decoders={image_key: tfds.decode.SkipDecoding()},
    )
    try:
        dataset = builder.as_dataset(
            split=data_config[split], shuffle_files=False, decoders=decoders
        )
    except AssertionError:  # what TFDS raises for a data set that is not on disk
        where = data_config.root or "the data directory of TFDS"
        raise UserError(
            f"{name} is not prepared in {where}: run `tfds build {name}` where there "
            "is a network and set data.root to its data directory"
        ) from None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{name}: data.{split}={data_config[split]!r} is not one of its splits "
            f"({_first_line(error)})"
        ) from None
    try:
        yield from tfds.as_numpy(dataset)
    except tf.errors.OpError as error:
        raise tfds_files.damaged(f"{name} {split}", reason(error)) from None


def _partial(
    features: tfds.features.FeaturesDict, wanted: list[str], **options: Any
) -> tfds.decode.PartialDecoding:
    """Leaves out all features but the wanted ones ("objects/label": a part of one)."""
    chosen: dict[str, Any] = {}
    for key in wanted:
        outer, _, inner = key.partition("/")
        if key in features:
            chosen[key] = True
        else:
            chosen.setdefault(outer, set()).add(inner)
    return tfds.decode.PartialDecoding(chosen, **options)


def _image_feature(name: str, features: tfds.features.FeaturesDict) -> str:
    for key, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            return key
    raise UserError(f"{name} has no image feature: choose another data.tfds_name")


def _label_feature(
    data_config: ConfigDict, features: tfds.features.FeaturesDict
) -> tuple[str, str, list[str]]:
    """Key and kind of the labels, and the class names."""
    name, found = data_config.tfds_name, _label_features(features)
    if not found:
        raise UserError(
            f"{name} has no feature with several labels an image (it has "
            f"{', '.join(features)}): choose another data.tfds_name"
        )
    called_so = [k for k in found if k.rpartition("/")[2] in ("label", "labels")]
    key = data_config.tfds_labels or [*called_so, *found][0]
    if key not in found:
        raise UserError(
            f"{name}: data.tfds_labels={key!r} is not one of its features with labels "
            f"({', '.join(found)})"
        )
    kind, class_names = found[key]
    if kind == _STATE and not data_config.classes:
        raise UserError(
            f"{name}: feature {key!r} holds a state of each class "
            f"({', '.join(class_names)}) and not the names of the classes: list them "
            "in a file in data.root, in its order and one a line, and name the file "
            "with data.classes"
        )
    if data_config.classes:
        file = os.path.join(data_config.root, data_config.classes)
        listed = files.class_names_of(file)
        if kind == _STATE:
            return key, kind, listed
        if kind != _TENSOR or len(listed) != len(class_names):
            raise UserError(
                f"{file} (data.classes): has {len(listed)} names, the "
                f"feature {key!r} of {name} has {len(class_names)} classes"
                + (", with names of their own" if kind != _TENSOR else "")
            )
        class_names = listed
    return key, kind, class_names


def _label_features(
    features: tfds.features.FeaturesDict,
) -> dict[str, tuple[str, list[str]]]:
    """Key -> (kind, class names) of every feature that can be labels, in the order of
    the list at the top."""
    found, in_objects, groups, tensors = {}, {}, {}, {}
    for key, feature in features.items():
        if isinstance(feature, tfds.features.Sequence):
            inner = feature.feature
            if isinstance(inner, tfds.features.ClassLabel):
                are_states = set(inner.names) <= _STATES.keys()
                found[key] = _STATE if are_states else _SEQUENCE, inner.names
            elif isinstance(inner, tfds.features.FeaturesDict):
                for part, label in inner.items():
                    if isinstance(label, tfds.features.ClassLabel):
                        in_objects[f"{key}/{part}"] = _SEQUENCE, label.names
        elif isinstance(feature, tfds.features.FeaturesDict):
            parts = feature.items()
            if parts and all(
                p.np_dtype == np.bool_ and p.shape == () for _, p in parts
            ):
                groups[key] = _GROUP, list(feature)
        elif type(feature) is tfds.features.Tensor and len(feature.shape) == 1:
            is_whole = np.issubdtype(feature.np_dtype, np.integer)
            count = feature.shape[0]
            if count and (is_whole or feature.np_dtype == np.bool_):
                tensors[key] = _TENSOR, [str(i) for i in range(count)]
    return found | in_objects | groups | tensors


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


def _values(
    name: str,
    place: int,
    key: str,
    kind: str,
    class_names: list[str],
    feature: tfds.features.FeatureConnector,
    example: dict[str, Any],
) -> np.ndarray:
    """The labels of an example that has a value for each class: [num_classes]."""
    if kind == _GROUP:
        return np.array([example[key][c] for c in class_names])
    values = np.asarray(example[key])
    if kind == _STATE:
        if len(values) != len(class_names):
            raise UserError(
                f"{name}: feature {key!r} of example {place} has {len(values)} states, "
                f"and data.classes names {len(class_names)} classes"
            )
        # The last is for -1, which TFDS writes for a state that it does not know.
        labels = np.array([*(_STATES[state] for state in feature.feature.names), -1])
        return labels[values]
    if wrong := set(np.unique(values).tolist()) - {0, 1, -1}:
        raise UserError(
            f"{name}: feature {key!r} of example {place} must hold 0, 1 and -1 "
            f"(unknown), found {min(wrong)}: name another with data.tfds_labels"
        )
    return values


def _known(example: dict[str, Any], key: str) -> np.ndarray:
    """The labels in an example; TFDS writes -1 for a label that it does not know."""
    outer, _, inner = key.partition("/")
    labels = example[key] if key in example else example[outer][inner]
    return labels[labels >= 0]


def _memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
