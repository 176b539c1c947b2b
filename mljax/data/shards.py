"""Images in a few large files, here or in an object store: what mljax.data.shard wrote.

    data.name = "shards", data.root = the folder, or gs://bucket/folder

A folder holds `train-00000-of-00007.tfrecord` ..., with one `tf.train.Example` an image
("image": its encoded bytes as they were, "name", "labels": the numbers of the classes
that are present, "unknown": those nobody checked), which any reader of TFRecords can
use. Beside them lie `dataset.json` (classes, files), `train.npz` and `val.npz` (labels,
how often each stands in an image where that is known, where each record starts),
`embeddings.npy` and `cooccurrence.npy` (the label graph).

Because it is known where each record starts, image i is read with one request, as if it
were a file. So batches are the same as from the files that were sharded, to the bit;
the order is a permutation of all images instead of a window over a few shards, and any
step starts at once on any number of hosts. ArrayRecord would give the same access, but
through Python for every image; a TFRecord with offsets is read inside TensorFlow, from
whatever `tf.io.gfile` opens. An object store takes long to answer, so let many requests
wait at once: data.parallel_reads=64.
"""

import io
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from zipfile import BadZipFile

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mljax.data.decode import decode
from mljax.data.source import Source
from mljax.errors import UserError

ABOUT = "dataset.json"  # written last: a folder without it is not finished
PLAN = "plan.json"  # written first
FORMAT = 1
SPLITS = ("train", "val")
_AGAIN = "copy it again, or give the same command of mljax.data.shard again"
# What numpy raises for an archive that is cut off, broken or another.
_DAMAGED = (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile, zlib.error)
_REQUESTS = 32  # at once, to an object store
RECORD_OVERHEAD = 16  # bytes around a record: its length, and two checksums


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The splits of the folder data.root.

    Raises UserError where it is not finished, damaged or of a newer version.
    """
    del seed
    root = data_config.root
    about = read_json(root, ABOUT)
    if about is None:
        if read_json(root, PLAN) is not None:
            raise UserError(
                f"data.root={root}: is not finished; give the same command of "
                "mljax.data.shard again"
            )
        raise UserError(
            f"data.root={root}: holds no {ABOUT}; `python -m mljax.data.shard` "
            "writes it"
        )
    about = about if isinstance(about, dict) else {}
    if about.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"data.root={root}: is of format {about['format']}, this version of "
            f"mljax reads {FORMAT}"
        )
    if not {"format", "class_names", "splits"} <= about.keys():
        raise UserError(f"{join(root, ABOUT)}: is not what was written; {_AGAIN}")
    tables = {split: _table(root, about, split) for split in SPLITS}
    sizes: dict[str, int] = {}
    for split, table in tables.items():
        ends = np.zeros(len(about["splits"][split]), np.int64)
        last = table["start"] + table["length"] + RECORD_OVERHEAD
        np.maximum.at(ends, table["shard"], last)
        sizes |= zip(about["splits"][split], ends.tolist(), strict=True)
    lost = incomplete(root, sizes)
    if lost:
        name, size = next(iter(lost.items()))
        what = "is missing" if size is None else f"has {size} bytes of {sizes[name]}"
        more = f" ({len(lost)} shards are like that)" if len(lost) > 1 else ""
        raise UserError(f"{join(root, name)}: {what}{more}; {_AGAIN}")
    return {
        split: _source(root, about, split, tables[split], data_config)
        for split in SPLITS
    }


def incomplete(root: str, sizes: Mapping[str, int]) -> dict[str, int | None]:
    """Those files of `sizes` (name -> bytes) that are not as long, and the bytes that
    they have; None where there is no such file."""

    def size(name: str) -> int | None:
        try:
            return tf.io.gfile.stat(join(root, name)).length
        except tf.errors.NotFoundError:
            return None
        except tf.errors.OpError as error:
            raise UserError(f"{join(root, name)}: {first_line(error)}") from None

    with ThreadPoolExecutor(_REQUESTS) as pool:
        found = zip(sizes, pool.map(size, sizes), strict=True)
        return {name: length for name, length in found if length != sizes[name]}


def _table(root: str, about: dict[str, Any], split: str) -> dict[str, np.ndarray]:
    """SPLIT.npz. Raises UserError where it does not belong to what `about` says."""
    path = join(root, f"{split}.npz")
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            table = dict(np.load(io.BytesIO(file.read()), allow_pickle=False))
        rows = (len(table["shard"]), len(about["class_names"]))
        shards = range(len(about["splits"][split]))
        if table["labels"].shape != rows or {*table["shard"].tolist()} != {*shards}:
            raise ValueError(f"it does not belong to {ABOUT}")
    except (tf.errors.OpError, *_DAMAGED) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); {_AGAIN}"
        ) from None
    return table


def _source(
    root: str,
    about: dict[str, Any],
    split: str,
    table: dict[str, np.ndarray],
    data_config: ConfigDict,
) -> Source:
    files = tf.constant([join(root, name) for name in about["splits"][split]])
    shard, start, length = (
        tf.constant(table[name]) for name in ("shard", "start", "length")
    )

    def encoded(index: tf.Tensor) -> tf.Tensor:
        file = tf.gather(files, tf.gather(shard, index))
        record = read_record(file, tf.gather(start, index), tf.gather(length, index))
        features = {"image": tf.io.FixedLenFeature([], tf.string)}
        return tf.io.parse_single_example(record, features)["image"]

    return Source(
        class_names=list(about["class_names"]),
        labels=table["labels"],
        names=unpack(table["names"]),
        read=lambda index: decode(encoded(index), data_config.max_pixels),
        split=split,
        content=lambda: [key.tobytes() for key in table["content"]],
        encoded=encoded,
        objects=table.get("objects"),
        notes=tuple(filter(None, unpack(table["notes"]))) if "notes" in table else (),
    )


def read_record(file: tf.Tensor, start: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """The record of a TFRecord file that begins at the byte `start` (all scalars)."""
    # TensorFlow has no operation that reads a part of a file, but a data set may begin
    # at an offset: this one has a single element.
    records = tf.raw_ops.TFRecordDatasetV2(
        filenames=[file],
        compression_type="",
        buffer_size=length + RECORD_OVERHEAD,
        byte_offsets=[start],
    )
    kind: dict[str, Any] = {"output_types": [tf.string], "output_shapes": [[]]}
    first = tf.raw_ops.TakeDataset(
        input_dataset=records, count=tf.constant(1, tf.int64), **kind
    )
    return tf.raw_ops.DatasetToSingleElement(dataset=first, **kind)[0]


def read_json(root: str, name: str, advice: str = _AGAIN) -> Any:
    """The content of a JSON file; None where there is none. Raises UserError."""
    path = join(root, name)
    try:
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path) as file:
            return json.loads(file.read())
    except (tf.errors.OpError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); {advice}"
        ) from None


def join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def pack(names: list[str]) -> np.ndarray:
    """Texts as one array of bytes; a path need not be valid UTF-8."""
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def unpack(names: np.ndarray) -> list[str]:
    return names.tobytes().decode("utf-8", "surrogateescape").split("\0")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
