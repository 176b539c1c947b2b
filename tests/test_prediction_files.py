"""Which images a folder stands for, and what is written of them."""

import errno
import json
import os

import numpy as np
import pytest

from mljax import predict
from mljax.errors import UserError
from mljax.prediction_files import Row, checked, find_images, writer


def test_what_macos_leaves_beside_a_file_is_no_image(tmp_path):
    for name in ("._1.jpg", "1.jpg", ".2.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert [f[-6:] for f in find_images(str(tmp_path))] == [".2.jpg", "/1.jpg"]


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("album/1.jpg", "album/more/2.jpg", "elsewhere/below/3.jpg"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    album = tmp_path / "album"
    (album / "a").symlink_to(album / "more")  # inside: found where it lies
    (album / "up").symlink_to(tmp_path)
    (album / "x").symlink_to(tmp_path / "elsewhere")
    (album / "y").symlink_to(tmp_path / "elsewhere" / "below")
    (album / "4.jpg").symlink_to(album / "1.jpg")
    (album / "gone").symlink_to(tmp_path / "nowhere")
    found = [name.removeprefix(str(album)) for name in find_images(str(album))]
    assert found == ["/1.jpg", "/4.jpg", "/more/2.jpg", "/x/below/3.jpg"]
    # A folder that is a link itself.
    assert find_images(str(album / "x")) == [str(album / "x/below/3.jpg")]


def test_no_name_is_not_this_folder(tmp_path, monkeypatch):
    """A variable of the shell that is not set."""
    (tmp_path / "1.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find_images(".") == ["1.jpg"]
    with pytest.raises(UserError, match="--images is empty"):
        find_images("")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "far").mkdir()
    scandir = os.scandir

    def broken(path):
        if str(path).endswith("far"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(UserError, match="far: cannot be listed .Input/output error"):
        find_images(str(tmp_path))


def test_every_picture_of_a_folder_gets_a_row(tmp_path):
    """By its name; what is in it is seen when it is read."""
    names = ["a.JPG", "b.jfif", "c.heic", "d.tiff"]
    for name in [*names, "notes.txt", "labels.json"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "e.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "f.jpg").mkdir()
    expected = [str(tmp_path / name) for name in [*names, "e.jpg"]]
    assert find_images(str(tmp_path)) == expected
    for path in expected[:4]:
        assert find_images(path) == [path]


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_what_is_close_to_0_or_1_keeps_its_order(kind, tmp_path):
    p = np.array([4e-9, 3e-7, 4e-7, 0.5, 0.99999961, 0.9999998], np.float32)
    names = [f"c{i}" for i in range(len(p))]
    file = tmp_path / f"out{kind}"
    with writer(str(file)) as output:
        output.begin(names)
        output.add(Row("a.jpg", p, ""), [])
    text = file.read_text()
    if kind == ".csv":
        found = text.splitlines()[1].split(",")[2:-1]
    else:
        found = list(json.loads(text)["probabilities"].values())
    np.testing.assert_array_equal(np.array(found, np.float32), p)


@pytest.mark.parametrize("kind", [".csv", ".json", ".jsonl"])
def test_what_is_not_a_number_is_said_in_words(kind, tmp_path):
    file = tmp_path / f"out{kind}"
    with writer(str(file)) as output:
        output.begin(["cat", "dog"])
        output.add(checked(Row("a.jpg", np.array([0.5, np.nan], "f4"), "")), [])
    text = file.read_text()
    assert "a.jpg" in text and "is not a number" in text and "nan" not in text.lower()
    if kind == ".json":
        assert [*json.loads(text)[0]] == ["path", "error"]


def test_the_program_counts_what_is_not_a_number(tmp_path, monkeypatch, capsys):
    class Model:
        class_names = ("cat", "dog")

        def each(self, paths):
            for path in paths:
                p = [0.9, np.nan] if path.endswith("a.jpg") else [0.9, 0.1]
                yield Row(path, np.array(p, np.float32), "")

        def names(self, p, threshold):
            return [n for n, x in zip(self.class_names, p, strict=True) if x > 0.5]

    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    monkeypatch.setattr(predict, "load", lambda *_: Model())
    file = tmp_path / "out.csv"
    flags = ["--checkpoint=x", f"--images={tmp_path}", f"--output={file}"]
    assert predict.main(flags) == 0
    said = capsys.readouterr()
    assert "2 images, 1 could not be read" in said.out
    assert "a.jpg: what the model gives for it is not a number" in said.err
    first, second = file.read_text().splitlines()[1:]
    assert ",,," in first and "cat" not in first and ",cat,0.9,0.1," in second
