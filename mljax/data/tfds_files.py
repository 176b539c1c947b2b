"""The examples of a prepared TensorFlow data set, by where they lie in its files."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from mljax.data.decode import reason
from mljax.data.shards import RECORD_OVERHEAD, read_record
from mljax.errors import PIP, UserError

_AT_ONCE = 8 << 20  # bytes of a request, where a file is read from end to end


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


def stored(
    builder: tfds.core.DatasetBuilder, split: str
) -> "TFRecords | ArrayRecords | None":
    """Where a split ("train[:50%]") is; None unless it is in files that can be read
    anywhere, and where there is no such split.

    Raises UserError where one of its files is missing.
    """
    formats = tfds.core.FileFormat
    known = builder.info.file_format in (formats.TFRECORD, formats.ARRAY_RECORD)
    if not known or not tf.io.gfile.exists(str(builder.data_path)):
        return None
    try:
        found = builder.info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError):
        return None
    parts = [Part(str(part.filename), part.skip, part.take) for part in found]
    for part in parts:
        if not tf.io.gfile.exists(part.file):
            raise UserError(
                f"{part.file}: is missing; copy it there, or prepare "
                f"{builder.info.full_name} again"
            )
    if builder.info.file_format == formats.TFRECORD:
        return TFRecords(parts)
    return ArrayRecords(builder, split)


class TFRecords:
    """Examples in TFRecord files, each read with one request."""

    def __init__(self, parts: list[Part]):
        self._parts = parts

    def examples(
        self,
        features: tfds.features.FeaturesDict,
        wanted: tfds.decode.PartialDecoding,
    ) -> Iterator[tuple[dict[str, Any], Place]]:
        """The wanted features of each example as numpy, in the order of the files.

        Raises UserError where a file is damaged.
        """
        some = wanted.extract_features(features)

        def parse(record: tf.Tensor) -> tuple[tf.Tensor, Any]:
            return tf.strings.length(record), some.deserialize_example(record)

        for number, part in enumerate(self._parts):
            records = tf.data.TFRecordDataset(part.file, buffer_size=_AT_ONCE)
            records = records.take(part.skip + part.take)
            records = records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
            records = records.prefetch(tf.data.AUTOTUNE)
            start = 0
            try:
                for i, (length, example) in enumerate(tfds.as_numpy(records)):
                    if i >= part.skip:
                        yield example, Place(number, start, int(length))
                    start += int(length) + RECORD_OVERHEAD
            except tf.errors.OpError as error:
                raise damaged(part.file, reason(error)) from None

    def images(self, places: list[Place], key: str) -> "Images":
        return Images([part.file for part in self._parts], places, key)


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
        return _image(read_record(file, start, length), self._key)


class ArrayRecords:
    """Examples in ArrayRecord files, which are read by their number.

    Through Python, since TensorFlow does not know the format.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._name = f"{builder.info.full_name} {split}"
        try:
            self._records: Sequence[bytes] = builder.as_data_source(
                split=split, deserialize_method=raw
            )
        except ImportError:
            raise UserError(
                f"{builder.info.full_name}: lies in ArrayRecord files; "
                f"`{PIP} array_record` reads them"
            ) from None

    def examples(
        self,
        features: tfds.features.FeaturesDict,
        wanted: tfds.decode.PartialDecoding,
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """The wanted features of each example as numpy, and its number.

        Raises UserError where a file is damaged.
        """
        some = wanted.extract_features(features)

        def records() -> Iterator[bytes]:
            for number in range(len(self._records)):
                try:
                    yield self._records[number]
                except Exception as error:  # what its C++ raises has no common type
                    text = " ".join(str(error).split()) or type(error).__name__
                    broken.append(f"example {number}: {text[:200]}")
                    return

        broken: list[str] = []
        spec = tf.TensorSpec([], tf.string)
        data = tf.data.Dataset.from_generator(records, output_signature=spec)
        data = data.map(some.deserialize_example, num_parallel_calls=tf.data.AUTOTUNE)
        try:
            for number, example in enumerate(tfds.as_numpy(data)):
                yield example, number
        except tf.errors.OpError as error:
            raise damaged(self._name, reason(error)) from None
        if broken:
            raise damaged(self._name, broken[0])

    def images(self, places: list[int], key: str) -> "Numbered":
        return Numbered(self._records, key)


class Numbered:
    """Reads the encoded image of example i of `records`."""

    def __init__(self, records: Sequence[bytes], key: str):
        self._records, self._key = records, key

    def __call__(self, index: tf.Tensor) -> tf.Tensor:
        record = tf.numpy_function(self._read, [index], tf.string)
        return _image(tf.ensure_shape(record, []), self._key)

    def _read(self, index: np.ndarray) -> bytes:
        try:
            return self._records[int(index)]
        except Exception:  # what its C++ raises has no common type
            return b""  # which has no image, as the next operation says


def _image(record: tf.Tensor, key: str) -> tf.Tensor:
    features = {key: tf.io.FixedLenFeature([], tf.string)}
    return tf.io.parse_single_example(record, features)[key]


def damaged(file: str, why: str) -> UserError:
    return UserError(
        f"{file}: cannot be read ({why}); copy it again or prepare the data set again"
    )
