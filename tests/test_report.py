"""The report: the page from work directories."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from mljax import (
    calibration,
    checkpoint,
    config,
    decision,
    label_graph_data,
    models,
    predict,
    versions,
    workdir,
)
from mljax.metrics import classification_report
from mljax.models.functional import split
from mljax.report import __main__ as report

NAMES = ["$x_", "<script>alert(1)</script>", "_hidden", 'a "quoted" & long ' * 3, "été"]


def make_run(folder, root, *, head="linear", names=NAMES, **changes):
    """A work directory as training leaves it, with random weights."""
    made = config.common()
    made.model.backbone, made.model.head = "small_resnet", head
    made.data.image_size, made.data.root = 32, str(root)
    made.epochs, made.eval.batch_size = 2, 8
    for key, value in changes.items():
        config.override(made, key.replace("__", "."), value)
    rng = np.random.default_rng(0)
    graph = None
    if head == "gcn":
        together = rng.random((len(names), len(names)))
        np.fill_diagonal(together, 0)
        vectors = rng.normal(size=(len(names), 300)).astype(np.float32)
        graph = label_graph_data.LabelGraph(list(names), together, vectors, 0.4, [])
    from flax import nnx

    model = models.build_model(
        made.model, len(names), angular=True, rngs=nnx.Rngs(0), graph=graph
    )
    folder.mkdir()
    if graph is not None:
        label_graph_data.save(folder, graph)
    params, batch_stats = split(model)
    about = {"config": made.to_dict(), "class_names": list(names)}
    about["versions"] = versions.installed() | {"jax": "0.0.1 of then"}
    checkpoint.save_variables(
        folder / "best" / "4", {"params": params, "batch_stats": batch_stats}, about
    )
    workdir.write_text(folder / "config.json", json.dumps(made.to_dict()))
    row = dict.fromkeys(("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1"), 0.25)
    row |= {"step": 2, "epoch": 1, "loss": 3.5, "mAP_raw": 0.25, "mAP_ema": None}
    row |= {"weights": "raw"}
    rows = [row, {**row, "step": 4, "epoch": 2, "loss": 3.0}]
    workdir.write_history(folder, rows)
    each = dict.fromkeys(names, 0.125)
    summary = {"best": rows[1], "last": rows[1], "per_class": each, "chosen_on": "val"}
    workdir.write_summary(folder, summary)
    return folder


def make_data(root, names=NAMES, count=12):
    root.mkdir()
    rng = np.random.default_rng(0)
    for split_name in ("train", "val"):
        images = []
        for i in range(count):
            pixels = rng.integers(0, 255, (30 + 9 * i, 60, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{split_name} <b>{i}.png")
            images.append([f"{split_name} <b>{i}.png", [names[i % len(names)]]])
        content = {"classes": list(names), "images": images}
        (root / f"{split_name}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_backbones):
    folder = tmp_path_factory.mktemp("report")
    root = make_data(folder / "data")
    one = make_run(folder / "one", root)
    return one, make_run(folder / "two", root, head="gcn", seed="7"), root


class Reader(HTMLParser):
    """What a browser would find: open tags that are never closed, and what it loads."""

    VOID = {"meta", "img", "br", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.scripts, self.sources, self.text = 0, [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def headings(self, page: str) -> list[str]:
        return re.findall(r"<h2[^>]*>(.*?)</h2>", page)


def test_the_page_of_one_run(runs, tmp_path, capsys):
    one, _, _ = runs
    output = tmp_path / "page.html"
    arguments = [f"--workdir={one}", f"--output={output}"]
    assert report.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"report: {output}" in printed
    text = output.read_text(encoding="utf-8")
    page = Reader(text)
    assert page.headings(text) == [
        "Figures",
        "Training",
        "Labels",
        "Precision and calibration",
        "Thresholds",
        "Confusions between labels",
        "Most wrong images",
        "Speed and memory",
        "Settings",
        "Versions",
    ]
    # Nothing from elsewhere, and no script but its own.
    assert all(s.startswith(("data:image/jpeg;base64,", "#")) for s in page.sources)
    assert page.scripts == 1 and "<script>alert" not in text and "<b>1.png" not in text
    shown = " ".join(page.text)
    for name in NAMES[:1] + NAMES[2:]:
        assert name in shown
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 3
    assert text.count("data:image/jpeg") == 2 * 12
    assert "0.0.1 of then" in shown and "training noted mAP 25.00" in shown
    assert "val <b>1.png" in shown and "loss, learning rate and speed" in shown
    assert "No thresholds are kept" in shown and "suggested threshold" in shown
    assert "is said above 0.5" in shown and "kept threshold</th>" not in text
    assert report.main(arguments) == 1 and "exists" in capsys.readouterr().err
    assert report.main(["--workdir", str(one)]) == 0  # beside what training wrote
    assert (one / "report.html").stat().st_size > 50_000


def rows_of(text, heading):
    """The cells of the first table below a heading, a list a row."""
    table = text[text.index(f"{heading}</h2>") :]
    table = table[table.index("<table") : table.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    return [[html.unescape(cell) for cell in row] for row in cells]


def test_kept_thresholds_are_the_ones_shown(runs, tmp_path):
    one, _, root = runs
    folder, output = tmp_path / "kept", tmp_path / "kept.html"
    shutil.copytree(one, folder)
    above = np.linspace(0.2, 0.6, len(NAMES)).astype(np.float32)
    scale = np.full(len(NAMES), 0.5, np.float32)
    fitted = calibration.Calibration(scale, scale - 0.7)
    about = {"for": "F1", "on": "12 images, val"}
    about |= {"before": {"OF1": 0.25}, "after": {"OF1": 0.26}}
    kept = decision.Decision(above, fitted, about)
    decision.save(folder / "best" / "4", NAMES, kept)
    assert report.main([f"--workdir={folder}", f"--output={output}"]) == 0
    text = output.read_text(encoding="utf-8")
    Reader(text)
    assert "No thresholds are kept" not in text and "suggested" not in text
    assert "Chosen for F1 on 12 images, val." in text
    assert "OF1 25.00 at 0.5, 26.00 with them" in text
    assert "is said above its kept threshold" in text and "as trained, ECE" in text

    images = [root / f"val <b>{i}.png" for i in range(12)]
    labels = np.eye(len(NAMES), dtype=int)[np.arange(12) % len(NAMES)]
    p, plain = (predict.load(run).predict(images) for run in (folder, one))
    assert np.abs(p - plain).max() > 0.01  # calibrated
    head, *rows = rows_of(text, "Thresholds")
    assert head == ["label", "images", "kept threshold", "P", "R", "F1", "F1 at 0.5"]
    for c, row in enumerate(rows):
        assert row[0] == NAMES[c] and float(row[2]) == pytest.approx(above[c], abs=5e-4)
        f1 = sk.f1_score(labels[:, c], p[:, c] > above[c], zero_division=0)
        at_half = sk.f1_score(labels[:, c], plain[:, c] > 0.5, zero_division=0)
        assert list(map(float, row[5:])) == pytest.approx(
            [100 * f1, 100 * at_half], abs=0.06
        )
    head, *rows = rows_of(text, "Figures")
    assert head == ["%", "p > 0.5", "kept thresholds", "the 3 likeliest"]
    expected = 100 * classification_report(p, labels, above)["OF1"]
    assert float(dict((r[0], r[2]) for r in rows)["OF1"]) == pytest.approx(
        expected, abs=0.006
    )

    (folder / "best" / "4" / decision.FILE).write_text("{")
    flags = [f"--workdir={folder}", f"--output={output}", "--overwrite"]
    assert report.main([*flags, f"--root={tmp_path / 'gone'}"]) == 0
    text = output.read_text(encoding="utf-8")
    assert "the thresholds: " in text and "delete it" in text


def test_runs_side_by_side(runs, tmp_path):
    one, two, _ = runs
    output = tmp_path / "page.html"
    flags = [f"--workdir={one}", f"--workdir={two}", f"--output={output}"]
    assert report.main(flags) == 0
    text = output.read_text(encoding="utf-8")
    page = Reader(text)
    assert page.headings(text)[:2] == ["Figures", "Settings that differ"]
    table = text[text.index("Settings that differ</h2>") :]
    table = table[: table.index("</table>")]
    keys = re.findall(r'<tr><td class="value">([\w.]+)</td>', table)
    assert keys == ["model.head", "seed"] or keys == ["seed", "model.head"]
    assert text.count('<details class="run">') == 2
    assert "Label graph of two" in text and "Label graph of one" not in text
    assert "second - first" in text


def test_what_is_gone_is_said_and_the_rest_is_there(runs, tmp_path):
    one, _, _ = runs
    folder, output = tmp_path / "moved", tmp_path / "page.html"
    shutil.copytree(one, folder)
    # As a kill or a full disk leaves it: the curves of the others are drawn.
    (folder / "tensorboard").mkdir(exist_ok=True)
    (folder / "tensorboard" / "events.out.tfevents.9").touch()
    flags = [f"--workdir={folder}", f"--output={output}", "--overwrite"]
    assert report.main([*flags, f"--root={tmp_path / 'gone'}"]) == 0
    text = output.read_text(encoding="utf-8")
    Reader(text)
    assert "no such file" in text and "12.5" in text  # AP as training noted
    assert "Speed and memory" in text and "Thresholds</h2>" not in text
    assert "No event timestamp" not in text
    shutil.rmtree(folder / "best")
    (folder / "metrics.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert report.main(flags) == 0
    text = output.read_text(encoding="utf-8")
    Reader(text)
    assert "the best weights" in text and "no evaluation was reached" in text


def test_the_data_may_have_moved(runs, tmp_path, capsys):
    one, _, root = runs
    there = tmp_path / "there"
    shutil.copytree(root, there)
    (there / "val <b>3.png").write_bytes(b"not an image")
    flags = [f"--workdir={one}", f"--output={tmp_path / 'page.html'}"]
    assert report.main([*flags, f"--root={there}"]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "the 11 images of val. 1 more could not be read" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workdir={tmp}/none"], "there is no such directory"),
        (["--workdir={tmp}"], "holds no run"),
        (["--workdir={one}", "--workdir={one}"], "named twice"),
        (["--workdir={one}", "--output={tmp}"], "name a file"),
        (["--workdir={one}", "--output={tmp}/no/page.html"], "there is no folder"),
        pytest.param(
            ["--workdir={one}", "--output=/proc/page.html"],
            "cannot be written",
            marks=pytest.mark.skipif(
                not Path("/proc/self").exists(), reason="needs a closed folder"
            ),
        ),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, flags, words):
    given = [flag.format(tmp=tmp_path, one=runs[0]) for flag in flags]
    assert report.main(given) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_names_of_runs(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert report.run_names(folders) == ["a/run", "b/run"]
    assert report.run_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
