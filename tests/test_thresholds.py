"""Thresholds with a checkpoint: chosen by the command, kept, used by predict."""

import json

import data_trees
import numpy as np
import pytest
from small_networks import SMALL

from mljax import (
    checkpoint,
    decision,
    export,
    held_out,
    operating_points,
    predict,
    thresholds,
)
from mljax import config as configs
from mljax.calibration import Calibration
from mljax.data import DATASETS, pipeline
from mljax.data.shapes import CLASS_NAMES
from mljax.decision import Decision
from mljax.errors import UserError
from mljax.models import BACKBONES
from mljax.models.functional import split
from mljax.run import make_run

NAMES = ["sky", "sea, é", "tree"]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name, make in SMALL.items():
        monkeypatch.setitem(BACKBONES, name, make)


def save_run(folder, num_val=48, names=CLASS_NAMES, **data):
    """A work directory as training leaves it, of 14 classes, with random weights."""
    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone, config.data.num_val = "small_resnet", num_val
    config.eval.batch_size = 16
    config.data.update(data)

    run = make_run(config, list(names))
    params, batch_stats = split(run.make_model())
    saves = checkpoint.Checkpoints(folder / "best")
    weights = {"params": params, "batch_stats": batch_stats}
    about = {"config": config.to_dict(), "class_names": list(names)}
    saves.save(5, weights, about)
    saves.close()
    return weights, about


def call(capsys, *arguments) -> str:
    """Runs the command; what it printed. Errors are one line."""
    code = thresholds.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == (1 if err else 0), err
    if err:
        assert err.startswith("error: ") and err.count("\n") == 1
    return err or out


def test_a_decision_comes_back_with_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    columns = rng.random((3, 3)).astype(np.float32)
    decided = Decision(columns[0], Calibration(*columns[1:]), {"for": "F1"})
    assert decision.save(tmp_path, NAMES, decided).name == decision.FILE
    found = decision.load(tmp_path, NAMES)
    assert found.about == {"for": "F1"}
    np.testing.assert_array_equal(found.thresholds, columns[0])
    np.testing.assert_array_equal(found.calibration, columns[1:])
    reordered = decision.load(tmp_path, NAMES[::-1])  # by name, not by place
    np.testing.assert_array_equal(reordered.thresholds, columns[0][::-1])
    decision.save(tmp_path, NAMES, Decision(columns[0], None, {}))
    assert decision.load(tmp_path, NAMES).calibration is None
    assert decision.default(3).thresholds.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s[: len(s) // 2], "delete it"),
        (lambda s: s.replace('"format": 1', '"format": 9'), "newer"),
        (lambda s: s.replace('"sky"', '"skies"'), "3 classes"),
        (lambda s: s.replace("0.25", '"high"'), "must be numbers"),
        (lambda s: s.replace("0.25", "1.5"), "below 1"),
        (lambda s: s.replace("0.25", "NaN"), "must be numbers"),
        (lambda s: s.replace("2.0", "-2.0"), "scales"),
        (lambda s: "[]", "not a file of mljax.thresholds"),
    ],
)
def test_damaged_files_are_one_line(change, word, tmp_path):
    ones = np.ones(3, np.float32)
    decided = Decision(ones / 4, Calibration(2 * ones, 0 * ones), {})
    file = decision.save(tmp_path, NAMES, decided)
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match=word) as raised:
        decision.load(tmp_path, NAMES)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_the_command(tmp_path, capsys, monkeypatch):
    weights, about = save_run(tmp_path)
    names = about["class_names"]
    image = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    before = predict.load(tmp_path)
    assert before.thresholds.tolist() == [0.5] * 14
    plain = before.predict(image)

    flags = ["--checkpoint", tmp_path, "--splits", 3]
    printed = call(capsys, *flags)
    assert "mean of 3 splits" in printed and "best epoch was chosen" in printed
    after = predict.load(tmp_path)
    np.testing.assert_array_equal(after.predict(image), plain)  # not calibrated
    chosen = after.thresholds
    val = DATASETS["shapes"](before.config.data, before.config.seed).val
    batches = pipeline.eval_batches(
        val, data_config=before.config.data, batch_size=len(val)
    )
    p = before.predict(next(batches)["image"])
    expected = operating_points.choose(p, val.labels).thresholds
    np.testing.assert_allclose(chosen, expected, rtol=1e-3)
    for row, labels in zip(plain, after.labels(image), strict=True):
        assert set(labels) == set(np.array(names)[row > chosen])
    assert set(after.labels(image, 0.0)[0]) == set(names)
    for line in printed.splitlines():
        if line.split(" ")[0] in names:
            name, _, threshold, *_ = line.split()
            assert float(threshold) == pytest.approx(
                chosen[names.index(name)], abs=1e-3
            )

    # Orbax is not disturbed: it reads the step, and saves and deletes beside it.
    found, _ = checkpoint.load_variables(tmp_path / "best" / "5")
    assert found.keys() == weights.keys()
    file = tmp_path / "best" / "5" / decision.FILE
    text = file.read_text()
    assert "exists" in call(capsys, *flags)  # nothing is overwritten
    assert file.read_text() == text

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (200, 14)).astype(np.float32)  # too sure of itself
    labels = (logits / 3 + rng.normal(0, 1, logits.shape) > 0).astype(np.int8)
    scores = names, logits, labels, "some data"
    monkeypatch.setattr(thresholds, "_scores", lambda *_: scores)
    more = ["--overwrite", "--calibrate", "platt", "--recall", 0.9]
    assert "200 images (some data) for recall 0.9" in call(capsys, *flags, *more)
    stored = json.loads(file.read_text())
    assert stored["chosen"]["for"] == "recall 0.9"
    calibrated = predict.load(tmp_path)
    logits = np.log(plain / (1 - plain))
    fitted = decision.load(file.parent, names).calibration
    expected = fitted.probabilities(logits)
    np.testing.assert_allclose(calibrated.predict(image), expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 1e-3

    # One positive, which one half of any two cannot have.
    labels[:] = 0
    labels[:4, 0] = 1, -1, -1, -1
    printed = call(capsys, *flags, "--overwrite")
    assert "could not be measured on halves of them: no class has" in printed
    stored = json.loads(file.read_text())["chosen"]
    assert stored["on"] == "200 images, some data" and "after" not in stored

    saves = checkpoint.Checkpoints(tmp_path / "best")
    assert saves.latest() == 5
    for step in (6, 7):  # two are kept
        saves.save(step, weights, about)
    saves.close()
    assert not file.parent.exists()
    assert predict.load(tmp_path).thresholds.tolist() == [0.5] * 14


def test_images_held_out_of_other_data_are_refused(tmp_path):
    data_trees.tree(tmp_path, num_train=60)
    whole = configs.common()
    whole.data.update(name="annotations", root=str(tmp_path), holdout=0.3)
    sources = DATASETS["annotations"](whole.data, whole.seed)
    about = {
        "config": whole.to_dict(),
        "class_names": list("abc"),
        "data": {"holdout images": sources.holdout.fingerprint()},
    }
    source, name = held_out.load(about, None, None)
    assert source.names == sources.holdout.names and name == "30% held out of train"
    train = json.loads((tmp_path / "train.json").read_text())
    train["images"] = train["images"][5:]
    (tmp_path / "train.json").write_text(json.dumps(train))
    with pytest.raises(UserError, match="training data has changed since the run"):
        held_out.load(about, "holdout", None)
    assert held_out.load(about, "val", None)[0].names == sources.val.names
    del about["data"]  # a checkpoint of an older mljax
    held_out.load(about, "holdout", None)


def test_photos_that_are_gone_since_the_run_are_left_out(tmp_path, capsys):
    """Whatever the run did about them (data.on_error)."""
    root, workdir = tmp_path / "photos", tmp_path / "run"
    data_trees.tree(root, num_val=40)
    save_run(workdir, names="abc", name="annotations", root=str(root), on_error="stop")
    listed = json.loads((root / "val.json").read_text())
    paths = [root / name for name, _ in listed["images"]]
    paths[3].unlink()
    paths[17].write_bytes(paths[17].read_bytes()[:40])
    flags = ["--checkpoint", str(workdir), "--splits", "2"]
    model = ["--format", "savedmodel", "--output", str(tmp_path / "model")]
    for program, more in ((thresholds, flags), (export, flags[:2] + model)):
        assert program.main([*more, "--data", "val"]) == 0
        out, err = capsys.readouterr()
        assert "2 of the 40 held-out images cannot be read and are left out" in err
        assert "Traceback" not in err and "val" in out
    found = decision.load(workdir / "best" / "5", "abc").thresholds

    listed["images"] = [i for k, i in enumerate(listed["images"]) if k not in (3, 17)]
    (root / "val.json").write_text(json.dumps(listed))
    flags.append("--overwrite")
    assert thresholds.main(flags) == 0
    assert capsys.readouterr().err == ""
    again = decision.load(workdir / "best" / "5", "abc").thresholds
    np.testing.assert_array_equal(found, again)

    for path in paths:
        path.unlink(missing_ok=True)
    assert "none of the held-out images can be read" in call(capsys, *flags)


def test_what_is_gained_is_measured_on_the_other_half():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (400, 4)).astype(np.float32)
    seen = []

    def choose(z, y):
        seen.append(z)
        return decision.default(4), None

    found = thresholds.measure(logits, logits > 0, choose, 2, 0)
    assert found["before"].shape == (2, 4)
    np.testing.assert_array_equal(found["before"], found["after"])
    np.testing.assert_array_equal(found["before"][:, :2], 1)
    assert [len(z) for z in seen] == [200, 200] and (seen[0] != seen[1]).any()

    # Labels by logits above 2: the right threshold is known from the other half.
    args = thresholds.parse(["--checkpoint", "x", "--calibrate", "platt"])
    found = thresholds.measure(logits, logits > 2, thresholds.chooser(args), 5, 0)
    assert (found["after"][:, :2] > found["before"][:, :2]).all()
    assert (found["after"][:, 2:] < found["before"][:, 2:]).all()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--data", "holdout"], "--data val"),
        (["--precision", "2"], "error: --precision=2.0"),
        (["--recall", "0"], "error: --recall=0.0"),
        (["--beta", "nan"], "error: --beta=nan"),
        (["--splits", "0"], "--splits"),
        (["--seed", "-1"], "error: --seed=-1"),
        (["--shrink", "-1"], "error: --shrink=-1.0"),
    ],
)
def test_mistakes_are_one_line(flags, word, tmp_path, capsys):
    save_run(tmp_path, num_val=16)
    assert word in call(capsys, "--checkpoint", tmp_path, *flags)
    assert not (tmp_path / "best" / "5" / decision.FILE).exists()
    with pytest.raises(SystemExit):
        thresholds.parse(["--checkpoint", "x", "--beta", "1", "--recall", "0.5"])
