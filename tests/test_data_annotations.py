import json
import time

import numpy as np
import pytest
from conftest import shared
from data_trees import blocks, data_config, encode, tree, write_json

from mljax.config import load as load_config
from mljax.data import DATASETS, annotations, files
from mljax.errors import UserError

LIMIT = 10**8


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        (tmp_path / f"photos/{i}.jpg").write_bytes(encode(blocks(i)))
    return tmp_path


def read(folder, classes, images):
    write_json(folder / "train.json", classes, images)
    return annotations.read(folder / "train.json", "train", LIMIT)


def test_labels_repeated_empty_and_unknown(folder):
    source = read(
        folder,
        ["dog", "cat", "ant"],
        [
            ["photos/0.jpg", ["dog", "dog", "cat"]],
            ["photos/1.jpg", []],
            ["photos/2.jpg", ["cat"], ["ant", "cat"]],
        ],
    )
    assert source.class_names == ["ant", "cat", "dog"]
    np.testing.assert_array_equal(source.labels, [[0, 1, 1], [0, 0, 0], [-1, 1, 0]])
    assert source.labels.dtype == np.int8
    assert source.names[1] == str(folder / "photos/1.jpg")
    assert source.read(2).shape == (40, 53, 3)


def test_integer_classes_are_sorted_by_value(folder):
    source = read(folder, [10, 9, 100], [["photos/0.jpg", [100]]])
    assert source.class_names == ["9", "10", "100"]
    np.testing.assert_array_equal(source.labels, [[0, 0, 1]])


def test_names_with_spaces_and_accents(folder):
    (folder / "photos/é t.jpg").write_bytes(encode(blocks()))
    assert read(folder, ["a"], [["photos/é t.jpg", ["a"]]]).read(0).shape == (40, 53, 3)


def test_take(folder):
    source = read(
        folder, ["a", "b"], [[f"photos/{i}.jpg", ["ab"[i % 2]]] for i in range(4)]
    )
    part = source.take([3, 0, 2]).take([2, 0], "holdout")
    assert part.split == "holdout" and len(part) == 2
    assert part.names == [source.names[2], source.names[3]]
    np.testing.assert_array_equal(part.labels, source.labels[[2, 3]])
    np.testing.assert_array_equal(part.read(0), source.read(2))
    assert part.content() == [source.content()[i] for i in (2, 3)]
    with pytest.raises(ValueError, match="indices"):
        source.take([4])


@pytest.mark.parametrize(
    ("classes", "images", "message"),
    [
        (["a"], [["photos/0.jpg", ["b"]]], r'"b" of image .photos/0.jpg.*\(1 such'),
        (["a"], [["photos/0.jpg", [], ["b", "c"]]], r"\(2 such labels\)"),
        ([1, 2], [["photos/0.jpg", [True]]], "label true"),
        ([1, 2], [["photos/0.jpg", [1.0, [2]]]], r"\(2 such labels\)"),
        (["a", "b", "a"], [["photos/0.jpg", ["a"]]], "'a' is listed more than once"),
        (["a", " "], [["photos/0.jpg", ["a"]]], "class ' ' in 'classes' is blank"),
        (["a", "b\ud83d"], [["photos/0.jpg", []]], "is blank or no text: give it"),
        (["a", 1], [["photos/0.jpg", ["a"]]], "'classes' must be a list"),
        ([], [["photos/0.jpg", []]], "'classes' must be a list"),
        ({"a": 1}, [["photos/0.jpg", []]], "'classes' must be a list"),
        ([["a"]], [["photos/0.jpg", []]], "'classes' must be a list"),
        (["a"], [], "at least one image"),
        (["a"], {}, "at least one image"),
        (["a"], [["photos/0.jpg", ["a"]], ["photos/1.jpg"]], "image 1 must be"),
        (["a"], [["photos/0.jpg", "a"]], "image 0 must be"),
        (["a"], [[0, ["a"]]], "image 0 must be"),
        (
            ["a"],
            [["photos/0.jpg", []], ["photos/x.jpg", []], ["y\0/\ud800.jpg", []]],
            r"'photos/x.jpg' is missing \(2 of 3",
        ),
        (["a"], [["photos", ["a"]]], "'photos' is missing"),
    ],
)
def test_wrong_content_is_one_clear_line(folder, classes, images, message):
    with pytest.raises(UserError, match=message) as error:
        read(folder, classes, images)
    assert "train.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "'classes' and 'images', found list"),
        (b'{"images": [], "categories": []}', r"found \['categories', 'images'\]"),
    ],
)
def test_wrong_file_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        annotations.read(tmp_path / "train.json", "train", LIMIT)
    assert "train.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"train.json: no such file; set data.root"):
        annotations.load(data_config(tmp_path))


def test_classes_must_agree(tmp_path):
    config = tree(tmp_path)
    content = json.loads((tmp_path / "val.json").read_text())
    write_json(tmp_path / "val.json", [*content["classes"], "new"], content["images"])
    with pytest.raises(UserError, match="differ in their classes.*'new' in val.json"):
        annotations.load(config)


def test_numbers_and_texts_are_not_sorted_alike(tmp_path):
    config = tree(tmp_path)
    for name, classes in ("train", [9, 10]), ("val", ["9", "10"]):
        file = tmp_path / f"{name}.json"
        images = json.loads(file.read_text())["images"]
        write_json(file, classes, [[image[0], []] for image in images])
    with pytest.raises(UserError, match="train.json and val.json have the same.*order"):
        annotations.load(config)


def test_holdout(tmp_path):
    config = tree(tmp_path, num_train=20)
    whole = DATASETS["annotations"](config, 0)
    assert whole.holdout is None and len(whole.train) == 20
    config.holdout = 0.25
    parts = DATASETS["annotations"](config, 0)
    held, kept = parts.holdout, parts.train
    assert held.split == "holdout" and len(held) == 5
    assert sorted(held.names + kept.names) == sorted(whole.train.names)
    config.holdout = 0.01
    with pytest.raises(UserError, match="data.holdout=0.01 of 20 images"):
        DATASETS["annotations"](config, 0)


def test_content_keys_find_duplicates(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"four")):
        (tmp_path / name).write_bytes(content)
    a, b, c, d = files.content_keys([str(tmp_path / n) for n in "abcd"])
    assert a == c and len({a, b, d}) == 3
    for name in "ab":  # no pictures, so not the same one
        (tmp_path / name).write_bytes(b"")
    assert len(set(files.content_keys([str(tmp_path / n) for n in "abcd"]))) == 4


@pytest.mark.parametrize(
    ("name", "images", "classes"),
    [
        ("VOC/train.json", 5011, 20),
        ("VOC/val.json", 4952, 20),
        ("NUS_WIDE/val.json", 50720, 81),
        ("VG500/val.json", 10000, 500),
    ],
)
def test_published_files(name, images, classes):
    path = shared(f"reference/annotations/{name}")
    started = time.perf_counter()
    # There are no images beside them.
    source = annotations.read(path, "val", LIMIT, missing="keep")
    assert time.perf_counter() - started < 20  # on an idle machine below 1
    assert source.labels.shape == (images, classes)
    assert len(source.class_names) == classes and source.labels.sum(1).min() > 0


@pytest.mark.parametrize(("name", "kind"), annotations._PUBLISHED.items())
def test_the_folder_of_a_published_set_is_known(tmp_path, name, kind):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"no such file; .*/{kind}\.py:original"):
        annotations.load(data_config(tmp_path))
    assert load_config(f"configs/{kind}.py", "original").data.name == kind
