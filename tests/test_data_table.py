"""CSV files as people and programs write them."""

import os

import numpy as np
import pytest
import source_trees
from data_trees import blocks, data_config, encode
from source_trees import TRAIN, load

from mljax.data import table
from mljax.errors import UserError


def test_empty_cells_can_mean_unknown(tmp_path):
    config = source_trees.write("table", tmp_path)
    config.table.empty = "unknown"
    expected = np.where(TRAIN == 0, np.int8(-1), TRAIN)
    np.testing.assert_array_equal(load(config).train.labels, expected)


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("['cat', 'dog']", ["cat", "dog"]),
        ("['cat' 'dog']", ["cat", "dog"]),
        ("['cat'\n 'dog']", ["cat", "dog"]),
        ('["a, b", "it\'s",]', ["a, b", "it's"]),
        ("[10, 2]", ["10", "2"]),
        ("[]", []),
        ("['cat', 'dog' 'cow']", None),
        ("['cat',, 'dog']", None),
        ("['cat', ['dog']]", None),
        ("['cat'] + ['dog']", None),
        ("[1.5]", None),
        ("[b'cat']", None),
        ("['cat", None),
        ("[cat]", None),
    ],
)
def test_lists_as_python_and_numpy_write_them(cell, names):
    assert table._listed(cell) == names


def test_lines_of_one_image_add_up(tmp_path):
    """A line for each (image, label), and labels that are numbers."""
    photo = encode(blocks(), "PNG")
    for name in ("p.png", "q.png"):
        (tmp_path / name).write_bytes(photo)
    text = "image,labels,unknown\np.png,10,2\nq.png,9,\np.png,2,9\n"
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(text)
    config = data_config(tmp_path, name="table", train="train.csv", val="val.csv")
    config.table.update(labels="labels", unknown="unknown")
    source = load(config).train
    assert source.class_names == ["2", "9", "10"]
    np.testing.assert_array_equal(source.labels, [[1, -1, 1], [0, 1, 0]])
    assert [os.path.basename(name) for name in source.names] == ["p.png", "q.png"]
    assert source.notes == (
        "1 lines name an image again: their labels are added to it",
    )
    # With a column for each label the lines stay, and it is said that they differ.
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("image,a,b\np.png,1,0\np.png,0,1\n")
    config.table.update(labels="", unknown="")
    source = load(config).train
    assert len(source) == 2
    assert "1 images are listed more than once with other labels" in source.notes[0]


def test_what_separates_cells_and_labels_otherwise_is_told(tmp_path, monkeypatch):
    photo = encode(blocks(), "PNG")
    names = [f"{i}.png" for i in range(7)]
    for name in names:
        (tmp_path / name).write_bytes(photo)
    found = ["a", "b", "c", "a b", "a c", "b c", "a b c"]
    for split in ("train", "val"):
        lines = [f"{n};{f}" for n, f in zip(names, found, strict=True)]
        text = "\n".join(["image;labels", *lines, ""])
        (tmp_path / f"{split}.csv").write_text(text)
    config = data_config(tmp_path, name="table", train="train.csv", val="val.csv")
    config.table.labels = "labels"
    with pytest.raises(UserError, match=r"table.delimiter=';' would split that"):
        load(config)
    config.table.delimiter = ";"
    note = "7 labels, which would be 3 if ' ' separated them (data.table.separator)"
    assert load(config).train.notes == (note,)
    with monkeypatch.context() as patch:  # before a table of them fills the memory
        patch.setattr(table, "_MOST_CELLS", 20)
        with pytest.raises(UserError, match="which would be 3 if ' ' separated them"):
            load(config)
    config.table.separator = " "
    assert load(config).train.notes == () and load(config).train.labels.sum() == 12


@pytest.mark.parametrize(
    ("lines", "changes", "classes", "note"),
    [
        # What stands between cells and around them.
        (['p, "cat;dog"', 'q, "dog"', "  , "], {}, ["cat", "dog"], None),
        (["p,cat\tdog", "q,dog"], {"separator": "tab"}, ["cat", "dog"], None),
        # Two spellings of one image.
        (["p,cat", "./p,dog", "q,"], {}, ["cat", "dog"], "1 lines name an image again"),
        # Another separator between a few of many.
        (
            [f"p,{c}" for c in "abcdefgh"] + ['q,"a, b"'],
            {},
            ["a", "a, b", *"bcdefgh"],
            "1 labels are lists of others with ',' between them, such as 'a, b'",
        ),
        (['p,"{cat,dog}"', "q,"], {}, "is no list of labels", None),
        (["p,\"('cat',)\"", "q,"], {}, "is no list of labels", None),
        (["p,'cat' ; \"dog\"", 'q,"""a"";b"'], {}, "is no list of labels", None),
    ],
)
def test_lists_as_people_write_them(tmp_path, lines, changes, classes, note):
    for name in ("p", "q"):
        (tmp_path / name).write_bytes(encode(blocks(), "PNG"))
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,labels", *lines, ""]))
    config = data_config(tmp_path, name="table", train="train.csv", val="val.csv")
    config.table.update(labels="labels", **changes)
    if isinstance(classes, str):
        with pytest.raises(UserError, match=classes):
            load(config)
        return
    source = load(config).train
    assert source.class_names == classes and len(source) == 2
    assert any(note in n for n in source.notes) if note else source.notes[1:] == ()


def test_label_columns_by_name(tmp_path):
    config = source_trees.write("table", tmp_path)
    config.table.columns = "cat, ant"
    sources = load(config)
    assert sources.train.class_names == ["ant", "cat"]
    np.testing.assert_array_equal(sources.train.labels, TRAIN[:, [0, 2]])


def test_a_label_column_without_a_name_is_not_dropped(tmp_path):
    config = source_trees.write("table", tmp_path)
    file = tmp_path / "train.csv"
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([f"{head},", *(f"{line},1" for line in lines)]))
    number = len(head.split(",")) + 1
    with pytest.raises(UserError, match=rf"column {number} has no name; .*columns"):
        load(config)
    config.table.columns = "cat, ant"
    assert load(config).train.class_names == ["ant", "cat"]
