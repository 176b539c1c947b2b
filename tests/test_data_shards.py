"""Shards: the same data as what was sharded, whole after any kill."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import source_trees
import tensorflow as tf
from all_sources import CLASSES, MAKERS, NUM_TRAIN, NUM_VAL, augmented, write_shards
from data_trees import data_config
from full_disk import small_files
from runs import ROOT

from mljax import data
from mljax.data import DATASETS, pipeline, shard, split
from mljax.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return MAKERS["shards"](root), root


def same_files(one, other):
    """Raises AssertionError unless two folders have the same files, to the byte."""
    found = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (one, other)]
    assert found[0].keys() == found[1].keys()
    assert [n for n in found[0] if found[0][n] != found[1][n]] == []


def test_everything_is_as_in_the_files(made):
    config, root = made
    files = data_config(root / "files", on_error="skip")
    for one, other in zip(
        DATASETS["annotations"](files, 0)[:2],
        DATASETS["shards"](config, 0)[:2],
        strict=True,
    ):
        assert one.class_names == other.class_names == CLASSES
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.names == other.names and one.split == other.split
        assert (one.labels == -1).any()
        same = [len(set(source.content())) for source in (one, other)]
        assert same[0] == same[1]
    for settings in (files, config):
        augmented(settings)
        settings.randaugment.n = 1
    batches = [
        pipeline.train_batches(
            DATASETS[c.name](c, 0).train, data_config=c, batch_size=4, seed=0
        )
        for c in (files, config)
    ]
    for _ in range(5):
        first, second = (next(b) for b in batches)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], name)
    config.holdout = files.holdout = 0.25
    held = [DATASETS[c.name](c, 0).holdout.names for c in (files, config)]
    assert held[0] == held[1]


def test_what_lies_beside_them(made):
    root = made[1] / "shards"
    about = json.loads((root / "dataset.json").read_text())
    assert len(about["splits"]["train"]) == 3 and about["class_names"] == CLASSES
    assert np.load(root / "embeddings.npy").shape == (3, 300)
    graph = np.load(root / "cooccurrence.npy")
    assert graph.shape == (3, 3) and graph[0, 1] == 3 / 6  # bee in 3 of 6 with ant
    assert not list(root.glob("*.part"))
    # Any reader of TFRecords can use them.
    files = [str(root / name) for name in about["splits"]["val"]]
    found = [
        tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(files)
    ]
    assert len(found) == NUM_VAL
    labels = [list(e.features.feature["labels"].int64_list.value) for e in found]
    assert labels == [[], [0], [1], [0, 1], [2]]
    assert found[2].features.feature["unknown"].int64_list.value[:] == [2]
    assert (
        found[0].features.feature["name"].bytes_list.value[0].endswith("é 0".encode())
    )


def test_a_finished_folder_is_left_alone(made, capsys):
    files, root = made[1] / "files", made[1] / "shards"
    before = {p: p.stat().st_mtime_ns for p in root.iterdir()}
    assert write_shards(files, root) == 0
    assert "complete already" in capsys.readouterr().out
    assert write_shards(files, root, "--images-per-shard=4") == 1
    assert "other images, labels or sizes" in capsys.readouterr().err
    assert write_shards(files, "") == 1
    assert "--output is empty" in capsys.readouterr().err
    assert write_shards(files, files) == 1
    assert "is not empty" in capsys.readouterr().err
    assert write_shards(files, files / "train.json") == 1
    assert "train.json: is a file; name a new folder" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in root.iterdir()} == before


def test_what_it_says_can_be_copied_into_a_shell(made, tmp_path, capsys):
    assert write_shards(made[1] / "files", tmp_path / "my shards") == 0
    said = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert said[-1] == f"--config.data.root={tmp_path / 'my shards'}"


def test_other_embeddings_replace_the_old_ones(made, tmp_path, capsys):
    files, root = made[1] / "files", tmp_path / "shards"
    shutil.copytree(made[1] / "shards", root)
    before = {p: p.read_bytes() for p in root.iterdir()}
    assert write_shards(files, root) == 0
    assert "embeddings.npy: label embeddings: random" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in root.iterdir()} == before
    words = "".join(f"{name} 1 2 {i}\n" for i, name in enumerate(CLASSES[:2]))
    (tmp_path / "glove.txt").write_text(words)
    flag = f"--config.model.graph.embeddings={tmp_path / 'glove.txt'}"
    assert write_shards(files, root, flag) == 0
    assert CLASSES[2] in capsys.readouterr().out  # it has no vector
    assert np.load(root / "embeddings.npy").shape == (3, 3)
    changed = {p.name for p in root.iterdir() if p.read_bytes() != before[p]}
    assert changed == {"embeddings.npy"}


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("train-00001-*.tfrecord", None, "is missing"),
        ("train-00001-*.tfrecord", 300, "has 300 bytes of "),
        ("val-00000-*.tfrecord", 0, "has 0 bytes of "),
        ("train.npz", None, "cannot be read"),
        ("train.npz", 0, "cannot be read"),
        ("val.npz", 100, "cannot be read"),
        ("dataset.json", 0, "cannot be read"),
        ("embeddings.npy", 10, None),
        ("val-00000-*.tfrecord.json", 10, None),
    ],
)
def test_what_was_lost_is_written_again(made, tmp_path, capsys, name, keep, message):
    files, root = made[1] / "files", tmp_path / "shards"
    shutil.copytree(made[1] / "shards", root)
    before = {p: p.read_bytes() for p in root.iterdir()}
    lost = next(root.glob(name))
    if keep is None:
        lost.unlink()
    else:
        lost.write_bytes(before[lost][:keep])
    config = data_config(root, name="shards")
    if message:
        advice = "copy it again, or give the same command of mljax.data.shard again"
        with pytest.raises(UserError, match=f"{lost.name}: {message}.*; {advice}"):
            DATASETS["shards"](config, 0)
    assert write_shards(files, root) == 0
    assert "complete already" not in capsys.readouterr().out or not message
    assert {p: p.read_bytes() for p in root.iterdir()} == before
    assert DATASETS["shards"](config, 0).train.names


def test_objects_and_notes_go_along(tmp_path, monkeypatch):
    real, notes = shard._load, ("one", "two ö")
    monkeypatch.setattr(
        shard,
        "_load",
        lambda c: {k: replace(s, notes=notes) for k, s in real(c).items()},
    )
    config = source_trees.write("voc", tmp_path / "voc")
    source = DATASETS["voc"](config, 0).train
    flags = ["--config.data.name=voc", f"--config.data.train={config.train}"]
    flags += [f"--config.data.{key}={config[key]}" for key in ("val", "difficult")]
    assert write_shards(tmp_path / "voc", tmp_path / "shards", *flags) == 0
    config = data_config(tmp_path / "shards", name="shards")
    found = DATASETS["shards"](config, 0).train
    np.testing.assert_array_equal(found.objects, source.objects)
    assert found.notes == notes


def test_a_note_is_given_once(made):
    config = data_config(made[1] / "shards", name="shards")
    source = DATASETS["shards"](config, 0).train
    config.expected.update(labels=len(source.class_names), train=9)
    noted = data._counted(source, config.expected)
    assert "not the 9 of the published data" in noted.notes[-1]
    assert data._counted(noted, config.expected) is noted
    images, labels = source.labels.shape
    source = replace(source, labels=np.eye(images, labels))
    left, gone = split.labelled(source), images - labels
    assert left.notes == (f"{gone} of {images} images have no label, left out",)
    assert split.labelled(left) is left


def test_stopped_at_any_place_it_ends_with_the_same_bytes(made, tmp_path, monkeypatch):
    files, whole = made[1] / "files", made[1] / "shards"
    real, writes = shard._example, [0]

    def dying(*arguments):
        writes[0] += 1
        if writes[0] in (2, 8, 20):  # in the middle of a shard, of another, of val
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(shard, "_example", dying)
    output = tmp_path / "out"
    codes = []
    for _ in range(4):
        codes.append(write_shards(files, output))
        if codes[-1]:
            with pytest.raises(UserError, match="is not finished"):
                DATASETS["shards"](data_config(output, name="shards"), 0)
    assert codes == [130, 130, 130, 0]
    # 17 images: a shard that was finished was not written again.
    assert writes[0] < 17 + 2 + 8
    for file in whole.iterdir():
        assert (output / file.name).exists(), file.name
        if file.suffix in (".tfrecord", ".json", ".npy"):
            assert (output / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("size", [100, 1000, 3000])  # of the plan, of a shard
def test_after_a_full_disk_the_same_command_goes_on(made, tmp_path, capsys, size):
    files, output = made[1] / "files", tmp_path / "out"
    with small_files(size):
        assert write_shards(files, output) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {output}/") and error.count("\n") == 1
    assert ": cannot be written (File too large); see to room and" in error
    assert write_shards(files, output) == 0
    same_files(made[1] / "shards", output)


def test_the_same_data_is_the_same_bytes_wherever_it_is(made, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(made[1] / "files", moved)
    for i in range(3):
        assert write_shards(moved, tmp_path / f"{i}") == 0
        same_files(tmp_path / "0", tmp_path / f"{i}")
    output = tmp_path / "0"
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    moved.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for root in ("elsewhere", tmp_path / "elsewhere", "./elsewhere/"):
        assert write_shards(root, output) == 0
        for file in output.iterdir():
            if file.suffix != ".npz":  # which tell where the photos are
                assert file.read_bytes() == before[file.name], file.name
        val = DATASETS["shards"](data_config(output, name="shards"), 0).val
        assert all(Path(name).exists() for name in val.names)
    (tmp_path / "elsewhere/val/é 0").rename(tmp_path / "elsewhere/val/other")
    listed = tmp_path / "elsewhere/val.json"
    content = json.loads(listed.read_text())
    content["images"][0][0] = "val/other"
    listed.write_text(json.dumps(content))
    assert write_shards("elsewhere", output) == 1


@pytest.mark.slow
def test_killed_at_random_moments(made, tmp_path):
    files, whole = made[1] / "files", made[1] / "shards"
    output = tmp_path / "out"
    command = [sys.executable, "-m", "mljax.data.shard", "--config=configs/corel5k.py"]
    command += [f"--config.data.root={files}", "--config.data.on_error=skip"]
    command += [f"--output={output}", "--images-per-shard=1"]
    rng = np.random.default_rng(0)
    for _ in range(6):
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not (output / "plan.json").exists() and running.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    config = data_config(output, name="shards")
    assert len(DATASETS["shards"](config, 0).train) == NUM_TRAIN
    assert len(list(whole.glob("*.tfrecord"))) == 4


def test_what_cannot_be_read_stops_or_stays(tmp_path, capsys):
    MAKERS["annotations"](tmp_path)
    source = DATASETS["annotations"](data_config(tmp_path), 0)
    real = shard._load

    def vanishing(config):
        found = real(config)
        Path(source.train.names[3]).unlink(missing_ok=True)
        return found

    stop = ["--config.data.on_error=stop"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "_load", vanishing)
        assert write_shards(tmp_path, tmp_path / "stopped", *stop) == 1
        assert "é 3: cannot be read" in capsys.readouterr().err
        Path(source.train.names[3]).write_bytes(b"")
        assert write_shards(tmp_path, tmp_path / "out") == 0
    assert "1 cannot be read and stay so" in capsys.readouterr().out
    config = data_config(tmp_path / "out", name="shards", on_error="skip")
    train = DATASETS["shards"](config, 0).train
    rows = list(pipeline.eval_batches(train, data_config=config, batch_size=12))
    assert np.flatnonzero(~rows[0]["ok"]).tolist() == [3, 7]
    Path(source.train.names[3]).write_bytes(b"")
    assert write_shards(tmp_path, tmp_path / "empty", *stop) == 1
    assert "é 3: cannot be read (is empty)" in capsys.readouterr().err
    assert write_shards(tmp_path, tmp_path / "with an empty one") == 0
    assert "1 cannot be read and stay so" in capsys.readouterr().out


def test_pictures_that_are_drawn_are_stored_without_loss(tmp_path):
    flags = ["--config=configs/shapes.py:debug", f"--output={tmp_path / 'out'}"]
    assert (
        shard.main([*flags, "--config.data.num_train=6", "--config.data.num_val=2"])
        == 0
    )
    drawn = DATASETS["shapes"](
        data_config(num_train=6, num_val=2, image_size=32, name="shapes"), 0
    )
    config = data_config(tmp_path / "out", name="shards", image_size=32)
    found = DATASETS["shards"](config, 0)
    for i in range(6):
        np.testing.assert_array_equal(found.train.read(i), drawn.train.read(i))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "dataset.json").unlink(), "is not finished"),
        (lambda root: [p.unlink() for p in root.iterdir()], "holds no dataset.json"),
        (lambda root: next(root.glob("val*.tfrecord")).unlink(), "is missing"),
        (lambda root: (root / "dataset.json").write_text("{"), "cannot be read"),
        (lambda root: (root / "dataset.json").write_text("[]"), "not what was written"),
        (lambda root: (root / "dataset.json").write_text('{"format": 9}'), "format 9"),
        (lambda root: (root / "dataset.json").write_text('{"format": 1}'), "not what"),
    ],
)
def test_errors_name_what_is_wrong(made, tmp_path, change, message):
    root = tmp_path / "copy"
    root.mkdir()
    for file in (made[1] / "shards").iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    change(root)
    with pytest.raises(UserError, match=message) as error:
        DATASETS["shards"](data_config(root, name="shards"), 0)
    assert "\n" not in str(error.value) and str(root) in str(error.value)


def test_a_damaged_record_is_an_unreadable_image(made, tmp_path):
    root = tmp_path / "copy"
    root.mkdir()
    for file in (made[1] / "shards").iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    name = sorted(p.name for p in root.glob("val-00000*.tfrecord"))[0]
    data = bytearray((root / name).read_bytes())
    data[200] ^= 255  # in the first record
    (root / name).write_bytes(data)
    config = data_config(root, name="shards", on_error="skip")
    val = DATASETS["shards"](config, 0).val
    rows = next(pipeline.eval_batches(val, data_config=config, batch_size=5))
    assert rows["ok"].tolist() == [False, True, True, True, True]
