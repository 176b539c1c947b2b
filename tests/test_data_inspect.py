"""The dataset doctor finds what was hidden in a data set, and says it."""

import html.parser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import source_trees
import tensorflow_datasets as tfds
from data_trees import blocks, data_config, encode, write_json
from full_disk import small_files
from PIL import Image
from runs import ROOT
from source_trees import TRAIN, TRAIN_UNKNOWN, VAL_UNKNOWN
from test_data_decode import exif_bytes

from mljax import config as configs
from mljax import workdir
from mljax.data import inspect, inspect_findings
from mljax.run import make_loss

ROGUE = '<script>alert(1)</script> & "é" $x$'


def config_file(folder, data):
    """A config of a user's own with the settings of `data`."""
    text = f"""from mljax.config import common
def get_config(arg=""):
    config = common()
    config.data.update({data.to_dict()!r})
    return config
"""
    (folder / "mine.py").write_text(text)
    return str(folder / "mine.py")


def inspected(folder, data, expect=0):
    code = inspect.main(
        ["--config", config_file(folder, data), "--output", str(folder / "report")]
    )
    assert code == expect
    if expect:
        return {}, ""
    report = json.loads((folder / "report/report.json").read_text())
    return report, (folder / "report/report.html").read_text()


def texts(report, level):
    return "\n".join(f["text"] for f in report["findings"] if f["level"] == level)


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """A data set with every trouble, and its report."""
    root = tmp_path_factory.mktemp("sick")
    same, other = encode(blocks(1)), encode(blocks(2))
    files = {
        "train a.jpg": same,
        "train b.jpg": other,
        "train b again.jpg": other,
        "truncated.jpg": same[:300],
        "empty.jpg": b"",
        "tiny.png": encode(blocks(3, 20, 40), "PNG"),
        "long.png": encode(blocks(4, 33, 200)[:, :64], "PNG"),
        "png.jpg": encode(blocks(5), "PNG"),
        "cmyk.jpg": encode(Image.fromarray(blocks(6)).convert("CMYK")),
        "grey.jpg": encode(Image.fromarray(blocks(7)).convert("L")),
        "deep.png": encode(np.full((40, 40), 999, np.uint16), "PNG"),
        "alpha.png": encode(np.dstack([blocks(8), blocks(8)[:, :, 0]]), "PNG"),
        "turned.jpg": encode(blocks(9), exif=exif_bytes(6, "<")),
        f"{ROGUE[:8]}.jpg": encode(blocks(10)),
        "val a.jpg": same,
        "val c.jpg": encode(blocks(11)),
    }
    long = Image.fromarray(blocks(4, 33, 53)).resize((200, 33))
    files["long.png"] = encode(long, "PNG")
    for name, content in files.items():
        (root / name).write_bytes(content)
    names = ["cat", "dog", ROGUE, "only in val"]
    train = [[n, ["cat"]] for n in files if not n.startswith("val")]
    train[1][1] = ["dog", ROGUE]
    train[3].append([ROGUE, "dog"])
    train.append(["gone.jpg", ["dog"]])
    train.append([train[4][0].replace("empty", "tiny").replace(".jpg", ".png"), []])
    write_json(root / "train.json", names, train)
    val = [["val a.jpg", ["cat"]], ["val c.jpg", ["only in val"]]]
    write_json(root / "val.json", names, val)
    return root, *inspected(root, data_config(root))


def test_counts(sick):
    _, report, _ = sick
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert train["images"] == 16 and val["images"] == 2
    assert train["labels"] == 16 and val["labels"] == 2
    assert train["images_by_number_of_labels"] == {"0": 1, "1": 14, "2": 1}
    assert train["unknown_labels"] == 2 and train["images_without_labels"] == 1
    assert report["class_names"] == sorted(["cat", "dog", ROGUE, "only in val"])
    by_name = {row["name"]: row for row in report["classes"]}
    assert by_name["cat"]["train"] == {"positives": 13, "unknown": 0, "share": 13 / 16}
    assert by_name["dog"]["train"] == {"positives": 2, "unknown": 1, "share": 2 / 15}
    assert by_name["cat"]["val"]["positives"] == 1
    assert train["classes_without_positives"] == ["only in val"]
    assert val["classes_without_positives"] == [ROGUE, "dog"]


def test_unreadable_images_and_their_reasons(sick):
    root, report, _ = sick
    found = {
        i["name"].removeprefix(f"{root}/"): i["reason"]
        for i in report["splits"]["train"]["unreadable"]
    }
    assert found.keys() == {"truncated.jpg", "empty.jpg", "gone.jpg"}
    assert found["empty.jpg"] == "the file is empty"
    assert "No such file" in found["gone.jpg"]
    assert found["truncated.jpg"] == "Invalid JPEG data, size 300"
    assert report["splits"]["val"]["unreadable"] == []


def test_sizes_and_forms(sick):
    root, report, _ = sick
    train = report["splits"]["train"]
    assert {i["name"] for i in train["tiny"]} == {f"{root}/tiny.png"}
    assert train["tiny"][0]["height"] == 20 and train["tiny"][0]["width"] == 40
    assert train["sizes_min_median_max"]["height"][0] == 20
    assert train["sizes_min_median_max"]["width"][2] == 200
    unusual = {
        trait: [name.removeprefix(f"{root}/") for name in names]
        for trait, names in train["unusual"].items()
    }
    assert unusual == {
        "longer than 4 to 1": ["long.png"],
        "named .jpg, but PNG": ["png.jpg"],
        "in CMYK": ["cmyk.jpg"],
        "in grey": ["grey.jpg"],
        "with 16 bits a channel": ["deep.png"],
        "with transparency (it is dropped)": ["alpha.png"],
        "turned by EXIF": ["turned.jpg"],
    }


def test_duplicates_and_leaks(sick):
    root, report, _ = sick
    groups = [
        (g["splits"], g["labels_differ"], [i["name"] for i in g["images"]])
        for g in report["duplicates"]
    ]
    a = [f"{root}/train a.jpg", f"{root}/val a.jpg"]
    b = [f"{root}/train b.jpg", f"{root}/train b again.jpg"]
    assert groups[0] == (["train", "val"], False, a) and len(groups) == 3
    assert (["train"], True, b) in groups
    assert (["train"], True, [f"{root}/tiny.png"] * 2) in groups


def test_findings_say_it(sick):
    _, report, _ = sick
    problems, looks = texts(report, "problem"), texts(report, "look")
    assert "train: 3 images cannot be read" in problems
    assert "train and val share 1 image" in problems
    assert "2 images stand there several times with different labels" in problems
    assert "train: 1 label without a positive" in problems and "only in val" in problems
    assert "val: 2 labels without a positive" in looks
    assert "2 images tiny" in looks and "named .jpg, but PNG" in looks
    assert "2 labels unknown (-1), in 1 image" in texts(report, "note")


class Checker(html.parser.HTMLParser):
    """Every tag is closed, in order."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_escaped(sick):
    root, report, page = sick
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    tags = [tag for tag, _ in checker.seen]
    assert "script" not in tags and "link" not in tags
    images = [attrs["src"] for tag, attrs in checker.seen if tag == "img"]
    assert len(images) > 12 and all(src.startswith("data:image/") for src in images)
    assert not re.search(r"(src|href)=.?(http|//)", page)
    assert "&lt;script&gt;alert(1)" in page and "the file is empty" in page
    assert "width=device-width" in page
    with Image.open(root / "report/contact_sheet.png") as sheet:
        assert sheet.width > 600
    assert (root / "report/cooccurrence.png").stat().st_size > 5000


def test_class_weights_are_what_the_losses_take(sick):
    root, report, _ = sick
    file = root / "report/class_weights.json"
    weights = json.loads(file.read_text())
    assert weights == report["class_weights"] and weights["dog"] > weights["cat"]
    assert all(0.2 <= w <= 5 for w in weights.values())
    config = configs.common()
    config.loss.name, config.loss.class_weights = "bce", str(file)
    names = report["class_names"]
    loss = make_loss(config, names)
    one = np.eye(4, dtype=np.float32)[[names.index("dog")]]
    plain, weighed = make_loss(configs.common(), names), loss
    known = np.where(one == 1, 1, -1)
    config.loss.class_weights = ""
    plain = make_loss(config, names)
    ratio = weighed(one, known) / plain(one, known)
    assert ratio == pytest.approx(weights["dog"], rel=1e-5)


@pytest.mark.parametrize("name", source_trees.WRITERS)
def test_every_source(tmp_path, name):
    if name in source_trees.WITH_UNKNOWN:
        data = source_trees.write(name, tmp_path, TRAIN_UNKNOWN, VAL_UNKNOWN)
        unknown = 2
    else:
        data, unknown = source_trees.write(name, tmp_path), 0
    said = []
    report, _, facts = inspect.inspect(data, 0, said.append)
    train = report["splits"]["train"]
    assert train["images"] == len(TRAIN) and train["unknown_labels"] == unknown
    assert train["unreadable"] == [] and all(f.height == 16 for f in facts["val"])
    assert sum(len(g["images"]) for g in report["duplicates"]) == 6  # greys 0, 1, 2
    assert said[0] == "train:   6 images, 3 classes, 1.50 labels an image"


def test_a_second_report(tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    data = source_trees.write("annotations", root, TRAIN_UNKNOWN, VAL_UNKNOWN)
    data.holdout = 0.3
    report, page = inspected(tmp_path, data)
    assert list(report["splits"]) == ["train", "holdout", "val"]
    assert "Some images of holdout" in page
    output = capsys.readouterr().out
    assert re.search(r"^label +train +holdout +val +unknown$", output, re.MULTILINE)
    assert re.search(r"^bee +\d+ +\d+ +\d+ +\d+$", output, re.MULTILINE)
    # What cannot be read leaves an earlier report as it is.
    shutil.rmtree(root)
    inspected(tmp_path, data, expect=1)
    assert "no such file" in capsys.readouterr().err
    assert json.loads((tmp_path / "report/report.json").read_text()) == report


def test_what_it_says_can_be_copied_into_a_shell(tmp_path, capsys):
    folder = tmp_path / "my data"
    folder.mkdir()
    inspected(folder, data_config("", name="shapes", num_train=2, num_val=2))
    said = shlex.split(capsys.readouterr().out.splitlines()[-1])
    weights = folder / "report" / "class_weights.json"
    assert f"--config.loss.class_weights={weights}" in said


def test_positives_and_unknown_labels_only(tmp_path):
    """As a set in which somebody named what is there and nothing else."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(blocks(i), "PNG"))
    for split in ("train", "val"):
        rows = [
            ["0.png", ["a"], ["b"]],
            ["1.png", ["a", "b"]],
            ["2.png", [], ["a", "b"]],
        ]
        write_json(tmp_path / f"{split}.json", ["a", "b", "c"], rows)
    report, _, _ = inspect.inspect(data_config(tmp_path), 0, print)
    assert report["splits"]["train"]["classes_without_negatives"] == ["a", "b"]
    assert report["splits"]["train"]["classes_without_positives"] == ["c"]
    problems = texts(report, "problem")
    assert "train: 2 labels without a known negative" in problems
    looks = texts(report, "look")
    assert "val: 2 labels without a known negative, whose AP is 100" in looks
    # Nothing is known of the third image but that it has no c.
    assert "without any label" not in texts(report, "note")


def test_names_that_look_like_a_slip():
    names = ["cat", "Cat", "traffic light", "traffic_light", "C++", "C#", "café"]
    (text,) = inspect_findings.odd_names(names)
    assert (
        text.startswith("2 labels in several spellings: ") and "'cat' and 'Cat'" in text
    )
    assert inspect_findings.odd_names([*"abc", "C"]) != []
    (text,) = inspect_findings.odd_names(["dog ", "a\nb", "ok"])
    assert text.startswith("2 labels with blanks") and r"'a\nb'" in text
    assert inspect_findings.odd_names(["cafe\u0301", "café"]) != []
    assert inspect_findings.odd_names(["人", "人々", "traffic light"]) == []


def test_a_name_that_is_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.png")
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "ok.png").write_bytes(encode(blocks(), "PNG"))
    for split in ("train", "val"):
        write_json(
            tmp_path / f"{split}.json", ["a"], [[name, ["a"]], ["ok.png", ["a"]]]
        )
    output = tmp_path / "report"
    done = subprocess.run(
        [sys.executable, "-m", "mljax.data.inspect", "--config=configs/common.py"]
        + [f"--config.data.root={tmp_path}", f"--output={output}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "udce9" in (output / "report.html").read_text()
    workdir.write_unreadable(tmp_path, {name, "ok.png"})
    assert (tmp_path / "unreadable.txt").read_text() == "caf\\udce9\\n.png\nok.png\n"


def test_sources_without_files(tmp_path):
    data = data_config("", name="shapes", num_train=20, num_val=5)
    report, _, _ = inspect.inspect(data, 0, print)
    assert report["splits"]["train"]["images"] == 20
    assert report["splits"]["train"]["sizes_min_median_max"]["height"] == [16, 16, 16]
    data = data_config(name="tfds", tfds_name="voc/2007", train="train", val="test")
    with tfds.testing.mock_data(num_examples=6):
        report, _, _ = inspect.inspect(data, 0, print)
    assert report["splits"]["val"]["images"] == 6
    assert "aeroplane" in report["class_names"]
    assert report["splits"]["val"]["unreadable"] == []


@pytest.mark.parametrize("last", ["picture", "text"])
def test_after_a_full_disk_the_same_command_works(tmp_path, capsys, monkeypatch, last):
    data = data_config("", name="shapes", num_train=2, num_val=2)
    folder = tmp_path / "report"
    write = workdir.write_text

    def full(file, text):
        with small_files():
            write(file, text)

    def inspected_on_a_full_disk():
        with monkeypatch.context() as patch:
            if last == "text":
                patch.setattr(workdir, "write_text", full)
                inspected(tmp_path, data, expect=1)
            else:
                with small_files(9000):
                    inspected(tmp_path, data, expect=1)
        error = capsys.readouterr().err
        assert error.startswith(f"error: {folder}/") and error.count("\n") == 1
        assert error.endswith(": File too large\n")

    inspected_on_a_full_disk()
    assert not list(folder.iterdir())
    (folder / ".report.part").mkdir()  # of a start that was killed
    (folder / ".report.part/contact_sheet.png").write_text("half")
    inspected(tmp_path, data)
    (folder / "thesis.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(before) == 6 and before["contact_sheet.png"] != b"half"
    data.num_train = 3
    inspected_on_a_full_disk()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    report, _ = inspected(tmp_path, data)
    assert report["splits"]["train"]["images"] == 3
    assert {p.name for p in folder.iterdir()} == before.keys()
    assert (folder / "thesis.txt").read_text() == "mine"


def test_the_output_is_not_someone_elses(tmp_path, capsys):
    data = data_config("", name="shapes", num_train=2, num_val=2)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/thesis.txt").write_text("mine")
    inspected(tmp_path, data, expect=1)
    assert "is not empty and holds no earlier report" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["thesis.txt"]
    (tmp_path / "report/thesis.txt").rename(tmp_path / "report/report.json")
    inspected(tmp_path, data, expect=1)
    assert "report.json there is of another program" in capsys.readouterr().err
    assert (tmp_path / "report/report.json").read_text() == "mine"
    (tmp_path / "report/report.json").unlink()
    for _ in range(2):
        inspected(tmp_path, data)
    (tmp_path / "report/class_weights.json").write_text("{}")
    inspected(tmp_path, data, expect=1)
    assert "is not as it was written" in capsys.readouterr().err
    assert (tmp_path / "report/class_weights.json").read_text() == "{}"
