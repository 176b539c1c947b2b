"""Damaged annotation files of every source: each loads or gives one clear error."""

import copy
import json
import random
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_trees
import tensorflow as tf
from source_trees import TRAIN, TRAIN_UNKNOWN, VAL, VAL_UNKNOWN

from mljax.data import DATASETS
from mljax.errors import UserError

TOKENS = [
    *(b'"', b"'", b"[", b"]", b"{", b"}", b",", b":", b";", b"\n", b"\r", b"\t"),
    *(b"\0", b"\xff", b"\xc3", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\\", b"\\ud800"),
    *(b"null", b"true", b"NaN", b"1e999", b"-1", b"2", b"9" * 30, b"9" * 5000),
    *(b"<", b">", b"&", b"&#0;", b"<!--", b"]]>", b"<!DOCTYPE x [", b"</annotation>"),
    *(b"[" * 3000, b"a" * 300, b"../", b"/", b"", b" ", b"['a', 1]", b"[[]]", b"\\x00"),
    *(b"<name></name>", b"<difficult>1</difficult>", b'<?xml encoding="utf-7"?>'),
]
VALUES = [None, True, False, 0, 1, -1, 1.0, 1.5, 2**70, "", "cat", "\ud800", "a\0b"]
VALUES += ["a\nb", [], {}, [[]], [1], ["cat"], {"id": 1}, float("nan"), "x" * 5000]


def nodes(tree: Any, found: list) -> list:
    """(container, key) of everything in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        found.append((tree, key))
        if isinstance(value, dict | list):
            nodes(value, found)
    return found


def change_tree(rng: random.Random, data: bytes) -> bytes:
    root = [json.loads(data)]
    for _ in range(rng.randint(1, 3)):
        places = nodes(root, [])
        if not places:
            break
        container, key = rng.choice(places)
        what = rng.randrange(4)
        if what == 0:
            container[key] = rng.choice(VALUES)
        elif what == 1:
            other, place = rng.choice(places)
            container[key] = json.loads(json.dumps(other[place]))
        elif what == 2:
            del container[key]
        elif isinstance(container, list):
            container.insert(key, container[key])
    return json.dumps(root[0] if root else None).encode()


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 1, 2, 8, 40]))
        what = rng.randrange(6)
        if what == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif what == 1:
            data = data[:at] + data[end:]
        elif what == 2:
            data = data[:at] + data[at:end] * rng.choice([2, 3, 50]) + data[end:]
        elif what == 3:
            rest = data[end:] if rng.random() < 0.5 else data[at:]
            data = data[:at] + rng.choice(TOKENS) + rest
        elif what == 4:
            data = data[:at]
        else:
            source = rng.randrange(len(data) + 1)
            data = data[:at] + data[source : source + 30] + data[at:]
    return data


def change_xml(rng: random.Random, data: bytes) -> bytes:
    root = ElementTree.fromstring(data)
    for _ in range(rng.randint(1, 3)):
        parent = rng.choice([e for e in root.iter() if len(e)] or [root])
        if not len(parent):
            break
        at = rng.randrange(len(parent))
        what = rng.randrange(5)
        if what == 0:
            parent.remove(parent[at])
        elif what == 1:
            parent.insert(at, copy.deepcopy(parent[at]))
        elif what == 2:
            parent[at].tag = rng.choice(["name", "object", "difficult", "x"])
        elif what == 3:
            parent[at].append(copy.deepcopy(rng.choice(list(root.iter()))))
        else:
            parent[at].text = rng.choice(["", "0", "1", "2", "cat", "cow", "<&", " 1 "])
    return ElementTree.tostring(root)


def change_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(lines) + 1), rng.choice([*lines, b"\n", b"1\n"])
        if rng.random() < 0.3:
            lines[at : at + 1] = []
        elif rng.random() < 0.5:
            lines[at : at + 1] = [other]
        else:
            lines.insert(at, other)
    return b"".join(lines)


_BY_STRUCTURE = {".json": change_tree, ".xml": change_xml}


def changed(rng: random.Random, file: Path, data: bytes) -> bytes:
    """The file with one to three changes: of its structure, or of any bytes."""
    if rng.random() < 0.6:
        return _BY_STRUCTURE.get(file.suffix, change_lines)(rng, data)
    return change_bytes(rng, data)


def written(name: str, root: Path):
    root.mkdir()
    if name in source_trees.WITH_UNKNOWN:
        return source_trees.write(name, root, TRAIN_UNKNOWN, VAL_UNKNOWN)
    return source_trees.write(name, root, TRAIN, VAL)


def load(config, number: int) -> bool:
    """Whether the data are loaded (and are what they should be) or refused."""
    try:
        sources = DATASETS[config.name](config, 0)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000, message
        names = ("/", "data.", ".json", ".csv", ".tsv", ".txt")
        assert any(name in message for name in names), message
        return False
    for source in (sources.train, sources.val):
        shape = len(source.names), len(source.class_names)
        assert source.labels.shape == shape and len(source)
        assert source.labels.dtype == np.int8
        assert set(np.unique(source.labels)) <= {-1, 0, 1}
        assert len(set(source.class_names)) == shape[1]
        if number % 7 == 0:
            try:
                source.read(tf.constant(0, tf.int64))
            except tf.errors.OpError:
                pass
    return True


def fuzz(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """How many of `count` changed trees were loaded, and how many refused."""
    rng = random.Random(seed)
    trees = {}
    for name in source_trees.WRITERS:
        config = written(name, folder / name)
        assert load(config, 0)  # as long as nothing is damaged
        texts = [
            file
            for file in sorted((folder / name).rglob("*"))
            if file.suffix in (".json", ".xml", ".txt", ".csv", ".tsv")
        ]
        trees[name] = config, {file: file.read_bytes() for file in texts}
    loaded, wrong = 0, []
    for number in range(count):
        config, texts = trees[list(trees)[number % len(trees)]]
        config.on_error = rng.choice(["stop", "skip"])
        config.drop_missing = rng.random() < 0.3
        file = rng.choice(list(texts))
        data = changed(rng, file, texts[file])
        file.write_bytes(data)
        started = time.perf_counter()
        try:
            loaded += load(config, number)
            assert time.perf_counter() - started < 20, "it took long"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:500]
            place = file.relative_to(folder)
            wrong.append(f"{number}, {place}: {found}\n  {data[:1000]!r}")
        file.write_bytes(texts[file])
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:20])
    return loaded, count - loaded


def test_damaged_annotations(tmp_path):
    found = fuzz(tmp_path, 350, seed=1)
    assert min(found) > 50, found


@pytest.mark.slow
def test_many_damaged_annotations(tmp_path):
    found = fuzz(tmp_path, 10_000, seed=0)
    assert min(found) > 1000, found
    print(found)
