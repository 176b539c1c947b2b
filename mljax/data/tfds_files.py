"""The examples of a prepared TensorFlow data set, by where they lie in its files."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from mljax.data.shards import RECORD_OVERHEAD, first_line, read_record
from mljax.errors import UserError


class Place(NamedTuple):
    """Where an example is: the number of its file, and bytes in it."""

    file: int
    start: int
    length: int


class Part(NamedTuple):
    """The examples of a file that belong to a split: `take` of them after `skip`."""

    file: str
    skip: int
    take: int


def parts(builder: tfds.core.DatasetBuilder, split: str) -> list[Part] | None:
    """Where a split ("train[:50%]") is; None unless it lies in TFRecord files."""
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        return None
    try:
        found = builder.info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError):
        return None
    listed = [Part(str(part.filename), part.skip, part.take) for part in found]
    return listed if all(tf.io.gfile.exists(part.file) for part in listed) else None


def examples(
    listed: list[Part],
    features: tfds.features.FeaturesDict,
    wanted: tfds.decode.PartialDecoding,
) -> Iterator[tuple[dict[str, Any], Place]]:
    """The wanted features of each example as numpy, in the order of the files.

    Raises UserError where a file is damaged.
    """
    some = wanted.extract_features(features)

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, Any]:
        return tf.strings.length(record), some.deserialize_example(record)

    for number, part in enumerate(listed):
        records = tf.data.TFRecordDataset(part.file).take(part.skip + part.take)
        start = 0
        try:
            for i, (length, example) in enumerate(
                tfds.as_numpy(records.map(parse, num_parallel_calls=tf.data.AUTOTUNE))
            ):
                if i >= part.skip:
                    yield example, Place(number, start, int(length))
                start += int(length) + RECORD_OVERHEAD
        except tf.errors.OpError as error:
            reason = first_line(error)
            raise UserError(f"{part.file}: cannot be read ({reason})") from None


class Images:
    """Reads the encoded image of example i, with one request.

    Args:
        files: the paths.
        places: of the examples.
        key: the feature with the image.
    """

    def __init__(self, files: list[str], places: list[Place], key: str):
        self._files, self._key = tf.constant(files), key
        columns = np.asarray(places, np.int64).reshape(-1, 3).T
        self._file, self._start, self._length = (tf.constant(c) for c in columns)

    def __call__(self, index: tf.Tensor) -> tf.Tensor:
        file = tf.gather(self._files, tf.gather(self._file, index))
        start, length = (tf.gather(x, index) for x in (self._start, self._length))
        features = {self._key: tf.io.FixedLenFeature([], tf.string)}
        record = read_record(file, start, length)
        return tf.io.parse_single_example(record, features)[self._key]
