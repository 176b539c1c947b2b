"""The report: its numbers against scikit-learn, and the page from work directories."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from mljax import checkpoint, config, label_graph_data, models, versions, workdir
from mljax.metrics import classification_report
from mljax.models.functional import split
from mljax.report import __main__ as report
from mljax.report import curves, numbers


def drawn(images: int = 200, classes: int = 6):
    """Probabilities with ties and labels that follow them, some unknown."""
    rng = np.random.default_rng(0)
    p = np.round(rng.random((images, classes)), 2).astype(np.float32)
    labels = (rng.random(p.shape) < p**2).astype(np.int8)
    labels[rng.random(p.shape) < 0.1] = -1
    return p, labels


def test_curve_is_that_of_scikit_learn():
    p, labels = drawn()
    found = numbers.curve(p[:, 0], labels[:, 0])
    known = labels[:, 0] != -1
    precision, recall, threshold = sk.precision_recall_curve(
        labels[known, 0], p[known, 0]
    )
    np.testing.assert_allclose(found.threshold, threshold[::-1])
    np.testing.assert_allclose(found.precision, precision[:-1][::-1])
    np.testing.assert_allclose(found.recall, recall[:-1][::-1])
    for r in (0.0, 0.31, 1.0):
        best = max(
            x for x, at in zip(precision, recall, strict=True) if at >= r and x < 1.1
        )
        # scikit-learn adds the point (0, 1), which no threshold gives
        if r > 0:
            assert found.at(np.array([r]))[0] == pytest.approx(best)
    assert numbers.curve(p[:, 0], 0 * labels[:, 0]) is None


def test_best_thresholds():
    p, labels = drawn()
    labels[:, 5] = np.minimum(labels[:, 5], 0)
    best = numbers.best_thresholds(p, labels)
    assert np.isnan([part[5] for part in best]).all()
    used = np.where(np.isnan(best.threshold), 0.5, best.threshold)
    again = numbers.at_thresholds(p, labels, used)
    for c in range(5):
        known = labels[:, c] != -1
        y, x = labels[known, c], p[known, c]
        highest = max(sk.f1_score(y, x > t) for t in np.unique([-1.0, *x]))
        assert best.f1[c] == pytest.approx(highest)
        assert again.f1[c] == pytest.approx(highest)
        assert again.recall[c] == pytest.approx(best.recall[c])
    everywhere = numbers.at_thresholds(p, labels, 0.5)
    expected = classification_report(p, labels)
    assert everywhere.precision.mean() == pytest.approx(expected["CP"])
    assert everywhere.recall.mean() == pytest.approx(expected["CR"])


def test_calibration_by_hand():
    p = np.array([[0.0, 0.05], [0.5, 1.0], [0.52, 0.9]], np.float32)
    labels = np.array([[0, 1], [1, 1], [0, -1]])
    found = numbers.calibration(p, labels, bins=10)
    np.testing.assert_allclose(found.said, [0.025, 0.51, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found.true, [0.5, 0.5, 1.0])
    np.testing.assert_array_equal(found.entries, [2, 2, 1])
    assert found.error == pytest.approx((2 * 0.475 + 2 * 0.01) / 5)


def test_confusions_and_most_wrong_by_hand():
    labels = np.array([[1, 0, 0], [1, 0, -1], [0, 1, 1], [1, 1, 1]])
    p = np.array([[0.1, 0.9, 0.9], [0.1, 0.8, 0.9], [0.6, 0.2, 0.9], [0.9] * 3])
    expected = [[0, 2, 1], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(numbers.confusions(p, labels), expected)
    losses = numbers.entry_losses(p, labels)
    assert losses[1, 2] == 0 and losses[0, 0] == pytest.approx(-np.log(0.1))
    np.testing.assert_array_equal(numbers.most_wrong(p, labels, 9), [0, 1, 2])
    np.testing.assert_array_equal(numbers.most_wrong(p, labels, 1), [0])


def test_curves_of_a_run_that_was_stopped(tmp_path):
    from clu import metric_writers

    for start, stop, add in ((1, 5, 0.0), (4, 8, 0.5)):
        writer = metric_writers.SummaryWriter(str(tmp_path))
        for step in range(start, stop):
            writer.write_scalars(step, {"train/loss": step + add})
        writer.close()
    found = curves.read_curves(tmp_path)
    steps, values = found.values["train/loss"]
    np.testing.assert_array_equal(steps, range(1, 8))
    np.testing.assert_allclose(values, [1, 2, 3, 4.5, 5.5, 6.5, 7.5])
    assert 0 <= found.seconds < 60


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
    assert report.main(arguments) == 1 and "exists" in capsys.readouterr().err
    assert report.main(["--workdir", str(one)]) == 0  # beside what training wrote
    assert (one / "report.html").stat().st_size > 50_000


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
    flags = [f"--workdir={folder}", f"--output={output}", "--overwrite"]
    assert report.main([*flags, f"--root={tmp_path / 'gone'}"]) == 0
    text = output.read_text(encoding="utf-8")
    Reader(text)
    assert "no such file" in text and "12.5" in text  # AP as training noted
    assert "Speed and memory" in text and "Thresholds</h2>" not in text
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
