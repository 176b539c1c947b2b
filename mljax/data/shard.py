"""Any data set as shards: `python -m mljax.data.shard --config ... --output DIR`.

Writes the images of train and val, as they are, into files of `--images-per-shard`
images each, and beside them the labels, label embeddings and co-occurrences; see
`mljax.data.shards`, which reads them. Stopped, the same command goes on: finished
shards are kept, a half-written one (`....part`) is written again.
"""

import argparse
import hashlib
import io
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from mljax import main as program
from mljax.errors import UserError

# Settings that act when shards are written, whatever the head.
_OF_GRAPH = (
    *("model.graph.adjacency", "model.graph.by_occurrences", "model.graph.embeddings"),
    *("model.graph.embedding_dim", "model.graph.embedding_std"),
)

if TYPE_CHECKING:
    from mljax.data.source import Source
    from mljax.label_graph_data import LabelGraph

IMAGES = 1024


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = program.make_parser(
        "python -m mljax.data.shard", "Write a data set as sharded records."
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a folder, or gs://..."
    )
    parser.add_argument(
        "--images-per-shard", type=int, default=IMAGES, help=f"default: {IMAGES}"
    )
    return program.parse_with(parser, argv)


def run(args: argparse.Namespace) -> None:
    """Writes the shards of a config's data set.

    Raises:
        UserError: the data cannot be read, or the folder holds something else or
            cannot be written.
    """
    config = program.read_config(args, _OF_GRAPH)
    if args.images_per_shard < 1:
        raise UserError(f"--images-per-shard={args.images_per_shard}: must be above 0")
    if not args.output:
        raise UserError("--output is empty: name a new folder")
    # Imported late: TensorFlow takes seconds, and a typing mistake is answered at once.
    from mljax.data import shards

    root = args.output
    sources = _load(config)
    graph = _graph(config, sources["train"])
    plan = _plan(sources, args.images_per_shard)
    about = {
        "format": shards.FORMAT,
        "class_names": sources["train"].class_names,
        "splits": plan["splits"],
    }
    _open(root, plan)
    lost = _lost(root, plan)
    _write_graph(root, graph)
    if not lost and _content(root, shards.ABOUT) == _json(shards.ABOUT, about):
        written = [
            _write_table(root, split, source, plan["splits"][split])
            for split, source in sources.items()
        ]
        print(
            f"{root}: tables are written again: they were not as they should be, or "
            "the photos have other paths now"
            if any(written)
            else f"{root}: is complete already (photos that changed under their old "
            "names are not read again: name a new folder for that)"
        )
        return
    unreadable: list[str] = []
    for split, source in sources.items():
        names = plan["splits"][split]
        for number, name in enumerate(names):
            first = number * args.images_per_shard
            rows = range(first, min(first + args.images_per_shard, len(source)))
            if name in lost:
                _write_shard(root, name, source, rows, config, unreadable)
            _progress(f"{split} {number + 1}/{len(names)}", number + 1 == len(names))
        _write_table(root, split, source, names)
    _write(root, shards.ABOUT, _json(shards.ABOUT, about))
    for split, source in sources.items():
        print(f"{split}: {len(source)} images in {len(plan['splits'][split])} shards")
    if unreadable:
        print(f"{len(unreadable)} cannot be read and stay so: {unreadable[0]} ...")
    quoted = shlex.quote(root)
    print(f"use them: --config.data.name=shards --config.data.root={quoted}")


def _load(config: ConfigDict) -> dict[str, "Source"]:
    from mljax.data import DATASETS
    from mljax.run import check_names

    check_names(config)
    data = config.data
    data.holdout = 0.0  # all of train: what is held out is the run's affair
    found = DATASETS[data.name](data, config.seed)
    return {"train": found.train, "val": found.val}


def _plan(sources: dict[str, "Source"], size: int) -> dict[str, Any]:
    """The files to come, and a key that is another for other images or labels, but not
    for the same ones in a folder that was moved or is spelled otherwise."""
    from mljax.data import shards

    digest = hashlib.sha256(f"{shards.FORMAT} {size}".encode())
    splits = {}
    for split, source in sources.items():
        digest.update(source.fingerprint().encode())
        count = -(-len(source) // size)
        splits[split] = [f"{split}-{i:05}-of-{count:05}.tfrecord" for i in range(count)]
    return {"format": shards.FORMAT, "key": digest.hexdigest(), "splits": splits}


def _open(root: str, plan: dict[str, Any]) -> None:
    """Makes the folder, or checks that it belongs to the same plan."""
    import tensorflow as tf

    from mljax.data import shards

    found = shards.read_json(root, shards.PLAN, "name another folder")
    if found == plan:
        return
    if found is not None:
        raise UserError(
            f"--output {root}: holds shards of other images, labels or sizes; name "
            "another folder"
        )
    try:
        if tf.io.gfile.exists(root):
            if not tf.io.gfile.isdir(root):
                raise UserError(f"--output {root}: is a file; name a new folder")
            # A plan is all that there can be of a start that failed at it.
            if {*tf.io.gfile.listdir(root)} - {f"{shards.PLAN}.part"}:
                raise UserError(
                    f"--output {root}: is not empty; name a new or empty folder"
                )
        tf.io.gfile.makedirs(root)
        _write(root, shards.PLAN, _json(shards.PLAN, plan))
    except tf.errors.OpError as error:
        raise UserError(f"--output {root}: {error.message}") from None


def _lost(root: str, plan: dict[str, Any]) -> set[str]:
    """The shards that are not finished, not there any more, or cut off."""
    from mljax.data import shards

    sizes = {}
    for name in [name for names in plan["splits"].values() for name in names]:
        try:
            about = shards.read_json(root, f"{name}.json")
            last = about["start"][-1] + about["length"][-1]
            sizes[name] = last + shards.RECORD_OVERHEAD
        except (UserError, TypeError, KeyError):  # damaged, or not there
            sizes[name] = -1  # as long as no file
    return set(shards.incomplete(root, sizes))


def _write_shard(
    root: str,
    name: str,
    source: "Source",
    rows: range,
    config: ConfigDict,
    unreadable: list[str],
) -> None:
    """One file of records, and NAME.json: where each starts, its length and hash."""
    import tensorflow as tf

    from mljax.data import shards

    part = shards.join(root, f"{name}.part")
    starts, lengths, keys, at = [], [], [], 0
    with _named(shards.join(root, name)), tf.io.TFRecordWriter(part) as writer:
        for row, data in zip(
            rows, _read(source, rows, config, unreadable), strict=True
        ):
            record = _example(source, row, data)
            writer.write(record)
            starts.append(at)
            lengths.append(len(record))
            # What cannot be read is like nothing else.
            key = data or b"unreadable " + source.names[row].encode(errors="replace")
            keys.append(hashlib.sha256(key).hexdigest())
            at += len(record) + shards.RECORD_OVERHEAD
    with _named(shards.join(root, name)):
        tf.io.gfile.rename(part, shards.join(root, name), overwrite=True)
    about = {"start": starts, "length": lengths, "content": keys}
    _write(root, f"{name}.json", _json(name, about))


def _read(
    source: "Source", rows: range, config: ConfigDict, unreadable: list[str]
) -> Iterator[bytes]:
    """The encoded bytes of images; without any where an image cannot be read."""
    import tensorflow as tf

    from mljax.data.decode import AWAY, patiently, reason
    from mljax.data.pipeline import num_cpus

    encoded = source.encoded or (lambda index: tf.io.encode_png(source.read(index)))

    def read(row: int) -> bytes | tf.errors.OpError:
        try:
            return patiently(lambda: encoded(tf.constant(row, tf.int64)).numpy())
        except AWAY as error:
            raise UserError(
                f"{source.names[row]}: cannot be read now ({reason(error)}): is its "
                "disk there? The same command goes on"
            ) from None
        except tf.errors.OpError as error:
            return error

    with ThreadPoolExecutor(config.data.parallel_reads or num_cpus()) as pool:
        for row, data in zip(rows, pool.map(read, rows), strict=True):
            if isinstance(data, bytes) and data:
                yield data
                continue
            why = reason(data) if isinstance(data, tf.errors.OpError) else "is empty"
            if config.data.on_error == "stop":
                raise UserError(
                    f"{source.names[row]}: cannot be read ({why}); replace it or set "
                    "data.on_error=skip"
                )
            unreadable.append(source.names[row])
            yield b""


def _example(source: "Source", row: int, data: bytes) -> bytes:
    import tensorflow as tf

    def numbers(value: int) -> tf.train.Feature:
        found = np.flatnonzero(source.labels[row] == value)
        return tf.train.Feature(int64_list=tf.train.Int64List(value=found))

    def text(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    name = source.names[row].encode("utf-8", "surrogateescape")
    feature = {
        "image": text(data),
        "name": text(name),
        "labels": numbers(1),
        "unknown": numbers(-1),
    }
    features = tf.train.Features(feature=feature)
    # Features are a map, which has no order of its own.
    return tf.train.Example(features=features).SerializeToString(deterministic=True)


def _write_table(root: str, split: str, source: "Source", names: list[str]) -> bool:
    """SPLIT.npz: what is known of each image, and where it is.

    Returns:
        False where it is there already.
    """
    from mljax.data import shards

    parts = [shards.read_json(root, f"{name}.json") for name in names]
    shard = [np.full(len(part["start"]), i) for i, part in enumerate(parts)]
    keys = b"".join(bytes.fromhex(key) for part in parts for key in part["content"])
    table: dict[str, Any] = {
        "labels": source.labels,
        "names": shards.pack(source.names),
        "notes": shards.pack(list(source.notes)),
        "shard": np.concatenate(shard),
        "start": np.concatenate([part["start"] for part in parts]).astype(np.int64),
        "length": np.concatenate([part["length"] for part in parts]).astype(np.int64),
        "content": np.frombuffer(keys, np.uint8).reshape(-1, 32),
    }
    if source.objects is not None:
        table["objects"] = source.objects
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **table)
    return _write(root, f"{split}.npz", buffer.getvalue())


def _graph(config: ConfigDict, train: "Source") -> "LabelGraph":
    """Of all of train; says what the embeddings are."""
    from mljax import label_graph_data

    config = config.copy_and_resolve_references()
    config.model.head = "gcn"
    graph = label_graph_data.build(config, train)
    assert graph is not None
    for note in graph.notes:
        print(f"embeddings.npy: {note}")
    return graph


def _write_graph(root: str, graph: "LabelGraph") -> None:
    """cooccurrence.npy and embeddings.npy, for model.graph.adjacency and .embeddings;
    another graph than that of the last start replaces it."""
    for what in ("cooccurrence", "embeddings"):
        buffer = io.BytesIO()
        np.save(buffer, getattr(graph, what))
        _write(root, f"{what}.npy", buffer.getvalue())


def _json(name: str, content: Any) -> bytes:
    return json.dumps(content, indent=None if "tfrecord" in name else 2).encode()


def _content(root: str, name: str) -> bytes | None:
    """The bytes of a file; None where there is none."""
    import tensorflow as tf

    from mljax.data import shards

    path = shards.join(root, name)
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()


def _write(root: str, name: str, content: bytes) -> bool:
    """Writes a file whole or not at all; False where it holds that already."""
    import tensorflow as tf

    from mljax.data import shards

    if _content(root, name) == content:
        return False
    part = shards.join(root, f"{name}.part")
    with _named(shards.join(root, name)):
        with tf.io.gfile.GFile(part, "wb") as file:
            file.write(content)
        tf.io.gfile.rename(part, shards.join(root, name), overwrite=True)
    return True


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Raises UserError where a file cannot be written: a full disk, no permission."""
    import tensorflow as tf

    from mljax.data import shards

    try:
        yield
    except tf.errors.OpError as error:
        why = shards.first_line(error).rpartition("; ")[2]  # what is before is `path`
        raise UserError(
            f"{path}: cannot be written ({why}); see to room and permission there and "
            "give the same command again: it goes on, or name another folder"
        ) from None


def _progress(text: str, last: bool) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for an error, 2 for wrong flags, 130 when interrupted."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return program.exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
