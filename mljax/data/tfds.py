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
      number a class                         values; data.classes names the classes,
                                             which are "0", "1", ... without it
    such a tensor of floats                  [num_classes]; its names likewise
    a sequence of texts                      the classes are those in data.classes,
                                             without it all that occur in train
    a sequence of numbers of classes         data.classes names the classes, from 0 on
    one class label                          "label" of cifar10; -1: all are unknown

`data.tfds_labels` names the feature. Without it, of the first five kinds one called
"label" or "labels" is taken, else the first in this order. Where there is none: of the
next three kinds one with such a name, else a class label, else the first of the three;
but texts of another name may be captions, so that these must be named. With
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

import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from mljax.data import tfds_files, tfds_labels
from mljax.data.decode import decode, reason
from mljax.data.source import Source
from mljax.errors import UserError

_MEMORY_SHARE = 1 / 3  # of the machine's memory, for encoded images


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The splits data.train and data.val of the builder data.tfds_name.

    Never downloads. Raises UserError where the data set is not prepared, is damaged,
    has no fitting features or must be kept in the memory and is too large for it.
    """
    del seed
    builder = _builder(data_config.tfds_name, data_config.root)
    room = _Room(_memory() * _MEMORY_SHARE)
    features = builder.info.features
    image_key = _image_feature(data_config.tfds_name, features)
    labels = tfds_labels.label_feature(data_config, features)
    sources: dict[str, Source] = {}
    for split in ("train", "val"):
        sources[split] = _read_split(
            builder, data_config, split, image_key, labels, room
        )
        if not labels.class_names:  # of texts: what occurs in train
            labels = labels._replace(class_names=sources[split].class_names)
    return sources


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
    image_key: str,
    labels: tfds_labels.Labels,
    room: _Room,
) -> Source:
    name, max_pixels = data_config.tfds_name, data_config.max_pixels
    features = builder.info.features
    rows = tfds_labels.Rows(data_config, split, labels, features)
    keys = [k for k in features if k.endswith("filename")]
    name_key = keys[0] if keys else None

    encoded: list[bytes] = []
    names: list[str] = []
    places: list[Any] = []
    wanted = [*rows.keys(), *([name_key] if name_key else [])]
    stored = tfds_files.stored(builder, data_config[split])
    found: Iterable[tuple[dict[str, Any], Any]]
    if stored is None:
        in_order = _examples(builder, data_config, split, image_key, wanted)
        found = ((example, None) for example in in_order)
    else:
        found = stored.examples(features, _partial(features, wanted))
    for example, place in found:
        rows.add(example)
        names.append(
            example[name_key].decode("utf-8", "surrogateescape")
            if name_key
            else f"{name} {split} {len(names)}"
        )
        if place is None:
            encoded.append(example[image_key])
            room.take(name, len(encoded[-1]))
        else:
            places.append(place)
    if not names:
        raise UserError(f"{name}: data.{split}={data_config[split]!r} has no images")
    class_names, values, objects = rows.finish()
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
        class_names=class_names,
        labels=values,
        names=names,
        read=lambda index: decode(read_encoded(index), max_pixels),
        encoded=read_encoded,
        split=split,
        content=content,
        objects=objects,
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


def _memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
