"""A disk that is full: the line names the file, and what was there stays."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from full_disk import small_files
from runs import ROOT

from mljax import errors, label_graph_data, pictures, whole, workdir
from mljax.errors import UserError
from mljax.label_graph_data import LabelGraph
from mljax.models import torch_files
from mljax.prediction_files import Row, writer


def _predictions(file):
    with writer(str(file)) as output:
        output.begin(["cat", "dog"])
        for i in range(99):
            output.add(Row(f"{i}.jpg", np.ones(2, np.float32), ""), ["cat"])


def _sheet(file):
    images = [np.zeros((9, 9, 3), np.uint8)]
    pictures.sheet(file, images, np.ones((1, 1)), None, ["cat"])


def _graph(file):
    graph = LabelGraph(["cat", "dog"], np.eye(2), np.ones((2, 300)), 0.4, [])
    label_graph_data.save(file.parent, graph)


WRITERS = {
    "page.html": lambda file: workdir.write_text(file, 999 * "x"),
    "sheet.png": _sheet,
    "p.csv": _predictions,
    "p.json": _predictions,
    "label_graph.npz": _graph,
    "w.safetensors": lambda file: torch_files.write(file, {"w": np.ones(99)}, []),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_file_is_named_and_the_old_one_stays(name, tmp_path):
    file = tmp_path / name
    if name != "w.safetensors":  # never replaced
        file.write_text("of before")
    there = [*tmp_path.iterdir()]
    with pytest.raises(OSError) as error, small_files():
        WRITERS[name](file)
    assert errors.one_line(error.value) == f"{file}: File too large"
    assert [*tmp_path.iterdir()] == there
    assert all(path.read_text() == "of before" for path in there)


def test_a_full_disk_is_named_with_what_to_do():
    full = "No space left on device"
    for error in (
        OSError(28, full),
        tf.errors.ResourceExhaustedError(None, None, f"out.part; {full}"),
    ):
        with pytest.raises(OSError) as raised, whole.named("out"):
            raise error
        assert errors.one_line(raised.value) == (
            f"out: {full}; free some space there, or name another place"
        )


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),  # of the terminal
        OSError(5, "Input/output error", "photo.jpg"),  # has a name
        UserError("photo.jpg: cannot be read (Input/output error)"),
        ValueError("of the program"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_as_they_are(error, tmp_path):
    file = tmp_path / "file"
    file.write_text("of before")
    with pytest.raises(type(error)) as raised, whole.replacing(file) as part:
        part.write_text("half")
        raise error
    assert raised.value is error
    assert getattr(error, "filename", None) in (None, "photo.jpg")
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "of before"


def test_a_picture_that_was_left_half_written_is_drawn(tmp_path):
    """Killed in the middle, nothing has the name of the picture."""
    file = tmp_path / "sheet.png"
    killed = (
        "import os, pathlib, matplotlib.figure as f;"
        "from mljax import pictures;"
        "f.Figure.savefig = lambda self, to, **k: (to.write_bytes(b'x'), os._exit(9));"
        f"pictures.save(f.Figure(), pathlib.Path({str(file)!r}))"
    )
    run = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, env=os.environ)
    assert run.returncode == 9
    assert [p.name for p in tmp_path.iterdir()] == [".sheet.png.part"]
    _sheet(file)
    assert [*tmp_path.iterdir()] == [file]
