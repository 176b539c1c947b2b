"""Images that are damaged, unusual, or vanish while they are needed."""

import itertools
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from data_trees import blocks, data_config, encode, tree, write_json
from test_data_decode import FILES, by_pil, exif_bytes

from mljax import evaluate
from mljax.data import annotations, decode, pipeline
from mljax.data.order import permutation
from mljax.errors import UserError
from mljax.progress import Progress

WHOLE = FILES["jpeg"]
DAMAGED = {
    "truncated.jpg": WHOLE[: len(WHOLE) // 2],
    "truncated.png": FILES["png"][:-40],
    "empty.jpg": b"",
    "page.jpg": b"<html>not found</html>",
    "folder.jpg": None,
}
DEEP = np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40
UNUSUAL = {
    "png called.jpg": FILES["png"],
    "jpeg called.png": WHOLE,
    "no ending": FILES["webp"],
    "progressive.jpg": FILES["progressive"],
    "cmyk.jpg": FILES["cmyk"],
    "grey.jpg": FILES["grey"],
    "alpha.png": FILES["png alpha"],
    "turned.jpg": encode(blocks(), exif=exif_bytes(6, "<")),
    "with spaces  .jpg": WHOLE,
    "кошка 猫 ü.jpg": WHOLE,
    "a%20b?c#d&e.jpg": WHOLE,
}


def test_damaged_images_among_unusual_ones(tmp_path):
    files = {**UNUSUAL, **DAMAGED, "16 bits.png": encode(DEEP, "PNG")}
    for name, content in files.items():
        if content is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content)
    names = sorted(files)
    write_json(tmp_path / "train.json", ["a"], [[name, ["a"]] for name in names])
    config = data_config(tmp_path, on_error="skip", antialias=False, image_size=40)
    source = annotations.read(tmp_path / "train.json", "train", 10**6, missing="keep")
    rows = list(pipeline.eval_batches(source, data_config=config, batch_size=6))
    ok = np.concatenate([row["ok"] for row in rows])[: len(names)]
    assert {name for name, fine in zip(names, ok, strict=True) if not fine} == set(
        DAMAGED
    )
    for i, name in enumerate(names):
        if name in UNUSUAL:
            found = source.read(i)
            np.testing.assert_array_equal(found, by_pil(files[name]), name)
    deep = source.read(names.index("16 bits.png"))
    np.testing.assert_array_equal(deep[:, :, 0], DEEP >> 8)

    config.on_error = "stop"
    for name in ("empty.jpg", "folder.jpg"):
        one = source.take([names.index(name)])
        with pytest.raises(UserError, match="cannot be read") as error:
            list(pipeline.eval_batches(one, data_config=config, batch_size=1))
        assert name in str(error.value) and "\n" not in str(error.value)
        if name == "empty.jpg":
            assert "the file is empty" in str(error.value)


def steps(source, config, count, **options):
    batches = pipeline.train_batches(
        source, data_config=config, batch_size=4, seed=0, **options
    )
    return batches, list(itertools.islice(batches, count))


def test_files_that_vanish_during_training(tmp_path):
    config = tree(tmp_path, num_train=12)
    config.on_error = "skip"
    source = annotations.load(config)["train"]
    batches, before = steps(source, config, 3)  # an epoch
    gone = [2, 5, 11]
    for i in gone:
        os.unlink(source.names[i])
    # Batches that were prepared ahead still have them: some steps (how many is up to
    # tf.data and the machine), then no more.
    after = list(itertools.islice(batches, 60))
    for epoch in range(48, 60, 3):
        seen = np.concatenate([b["index"][~b["ok"]] for b in after[epoch : epoch + 3]])
        assert set(seen) == set(gone)
    order = np.concatenate([permutation(12, 0, epoch) for epoch in range(21)])
    for at, batch in enumerate(before + after):
        index, ok = order[4 * at : 4 * at + 4], batch["ok"]
        np.testing.assert_array_equal(batch["index"], index)
        assert ok[~np.isin(index, gone)].all()
        # Image i is grey level i.
        np.testing.assert_array_equal(batch["image"][ok][:, 3, 3, 0], index[ok])
        np.testing.assert_array_equal(batch["labels"][ok], source.labels[index[ok]])
        assert (batch["labels"][~ok] == -1).all() and not batch["image"][~ok].any()
    # A run that starts again sees the same steps.
    resumed = annotations.load(config)["train"]
    _, again = steps(resumed, config, 2, start_step=61)
    for batch, expected in zip(again, after[58:], strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], expected[key])

    config.on_error = "stop"
    with pytest.raises(UserError, match="No such file"):
        steps(source, config, 4)
    with pytest.raises(UserError, match=r"is missing \(3 of 12 are\)"):
        annotations.load(config)


def test_an_image_that_cannot_be_read_is_tried_once(tmp_path, monkeypatch):
    """A part of a source has its own."""
    config = tree(tmp_path, num_train=12)
    config.on_error = "skip"
    source = annotations.load(config)["train"]
    os.unlink(source.names[5])
    tried = []
    plain = pipeline._one_by_one
    monkeypatch.setattr(
        pipeline, "_one_by_one", lambda *given: tried.append(given[1]) or plain(*given)
    )
    for _ in range(3):
        rows = list(pipeline.eval_batches(source, data_config=config, batch_size=4))
        assert [list(row["ok"]) for row in rows] == [
            [True] * 4,
            [True, False, True, True],
            [True] * 4,
        ]
        assert len(tried) == 1
    # All at once is no fault of the files: the disk may return.
    for i in range(4):
        os.rename(source.names[i], f"{source.names[i]}.away")
    first, *_ = pipeline.eval_batches(source, data_config=config, batch_size=4)
    assert not first["ok"].any() and source.unreadable == {5}
    for i in range(4):
        os.rename(f"{source.names[i]}.away", source.names[i])
    first, *_ = pipeline.eval_batches(source, data_config=config, batch_size=4)
    assert first["ok"].all()
    tried.clear()
    part = source.take([5, 6])
    assert not part.unreadable
    (row,) = pipeline.eval_batches(part, data_config=config, batch_size=2)
    assert list(row["ok"]) == [False, True] and len(tried) == 1


def test_an_error_that_passes_costs_no_image(tmp_path, monkeypatch):
    config = tree(tmp_path, num_train=12)
    config.on_error = "skip"
    source = annotations.load(config)["train"]
    waited, left = [], [3]
    monkeypatch.setattr(decode.time, "sleep", waited.append)

    def fails_at_times(index):
        if index == 5 and left[0]:
            left[0] -= 1
            raise OSError(24, "Too many open files")
        return open(source.names[index], "rb").read()

    def encoded(index):
        return tf.reshape(tf.numpy_function(fails_at_times, [index], tf.string), [])

    for count, ok in ((3, True), (9, False)):
        left[0] = count
        troubled = replace(source.take(range(12)), encoded=encoded)
        rows = pipeline.eval_batches(troubled, data_config=config, batch_size=12)
        (row,) = rows
        assert row["ok"][5] == ok and row["ok"].sum() == 11 + ok
        assert waited == [1, 2]
        waited.clear()


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_disk_with_errors_is_waited_for_once_a_step(tmp_path, monkeypatch, on_error):
    config = tree(tmp_path, num_train=12)
    config.on_error = on_error
    waited = []
    monkeypatch.setattr(decode.time, "sleep", waited.append)

    def fail(index):
        raise OSError(5, "Input/output error")

    def encoded(index):
        return tf.reshape(tf.numpy_function(fail, [index], tf.string), [])

    source = replace(annotations.load(config)["train"], encoded=encoded)
    rows = pipeline.eval_batches(source, data_config=config, batch_size=6)
    if on_error == "stop":
        with pytest.raises(UserError, match="0.png: cannot be read .*Input/output"):
            next(rows)
        assert waited == [1, 2]
    else:
        assert not any(row["ok"].any() for row in rows)
        assert waited == [1, 2, 1, 2] and not source.unreadable


def test_a_file_system_that_does_not_answer_ends_the_run(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(decode.time, "sleep", waited.append)
    away = tf.errors.UnavailableError(None, None, "Network is down")

    def read():
        raise away

    with pytest.raises(tf.errors.UnavailableError):
        decode.patiently(read)
    assert waited == [1, 2, 4, 8, 16]
    with pytest.raises(tf.errors.NotFoundError):
        decode.patiently(lambda: tf.io.read_file(str(tmp_path / "gone")))
    assert len(waited) == 5
    config = tree(tmp_path, num_train=12)
    config.on_error = "skip"
    source = annotations.load(config)["train"]
    os.unlink(source.names[5])
    monkeypatch.setattr(pipeline.decode, "patiently", lambda *_: read())
    with pytest.raises(
        UserError, match="read now .Network is down.: is its disk there"
    ):
        list(pipeline.eval_batches(source, data_config=config, batch_size=4))
    assert not source.unreadable


def batch(index, ok):
    return {"index": np.array(index), "ok": np.array(ok)}


def test_a_disk_that_is_gone_ends_the_run():
    progress, names = Progress(), ["a", "b", "c", "d"]
    for _ in range(5):
        progress.see(batch([0, 3], [False, False]), names, 3)
        progress.see(batch([1, 3], [False, False]), names, 3)
        progress.see(batch([1, 2], [False, True]), names, 3)
    assert progress.unreadable == {"a", "b", "d"}
    again = Progress.from_dict(progress.to_dict())
    assert again.unreadable == progress.unreadable
    bad = batch([0, 3], [False, False])
    again.see(bad, names, 3)
    again.see(bad, names, 3)
    with pytest.raises(
        UserError, match="not one image of 3 steps in a row.* was d: is"
    ):
        again.see(bad, names, 3)


def of_step(loss, finite=True):
    return {"loss": np.float32(loss), "finite": np.bool_(finite)}


def test_steps_that_are_not_finite_end_the_run():
    progress, bad = Progress(), of_step(np.nan, finite=False)
    assert progress.end_of_epoch_loss() is None
    for metrics in (of_step(1), bad, bad, of_step(2), bad, bad):
        progress.take(metrics, 3)
    progress = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    with pytest.raises(UserError, match="3 steps in a row .* not finite .*max_bad_ste"):
        progress.take(bad, 3)
    assert progress.skipped == 5
    assert progress.end_of_epoch_loss() == 1.5
    progress.take(of_step(4), 3)
    assert progress.end_of_epoch_loss() == 4 and progress.end_of_epoch_loss() is None


def test_the_top_three_are_those_with_the_highest_scores():
    """All of these have a probability of 1.0 in float32."""
    outputs = 23 * np.float32([[0.8, 0.8, 0.8, 0.1, 0.95, 0.95, 0.95]])
    labels = np.array([[0, 0, 0, 0, 1, 1, 1]])
    scores = evaluate.Scores(outputs, labels, np.arange(1), np.arange(0))
    found = evaluate.report(scores, lambda x: 1 / (1 + np.exp(-x)))
    assert found["OP_top3"] == found["OR_top3"] == found["OF1_top3"] == 1


def test_evaluation_without_a_readable_positive():
    outputs = np.zeros((3, 2), np.float32)
    labels = np.array([[0, 0], [-1, -1], [0, -1]])
    scores = evaluate.Scores(outputs, labels, np.arange(3), np.array([1]))
    assert evaluate.unreadable({"raw": scores}, ["a", "b", "c"]) == ["b"]
    with pytest.raises(UserError, match="no image that can be read.*1 of 3 images"):
        evaluate.report(scores, lambda x: x)
