import itertools
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from data_trees import blocks, data_config, encode, tree, write_json
from PIL import Image

from mljax.data import annotations, pipeline
from mljax.data.order import class_aware, permutation
from mljax.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    config = tree(tmp_path_factory.mktemp("tree"), num_train=10, num_val=5)
    return annotations.load(config), config


def steps(sources, count, seed=0, batch_size=4, **options):
    batches = pipeline.train_batches(
        sources[0]["train"],
        data_config=sources[1],
        batch_size=batch_size,
        seed=seed,
        **options,
    )
    return list(itertools.islice(batches, count))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], key)


def test_forms_and_contents(sources):
    labels = sources[0]["train"].labels
    for batch in steps(sources, 3):
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "image": ((4, 16, 16, 3), "uint8"),
            "labels": ((4, 3), "int8"),
            "index": ((4,), "int64"),
            "ok": ((4,), "bool"),
        }
        # Image i is grey level i.
        np.testing.assert_array_equal(batch["image"][:, 5, 7, 1], batch["index"])
        np.testing.assert_array_equal(batch["labels"], labels[batch["index"]])
        assert batch["ok"].all()


def test_an_epoch_is_a_permutation_without_its_rest(sources):
    index = np.stack([b["index"] for b in steps(sources, 6)]).reshape(3, 8)
    assert all(len(set(epoch)) == 8 for epoch in index)
    assert (index[0] != index[1]).any() and (index[1] != index[2]).any()


def test_rare_classes_are_drawn_more_often_if_that_is_asked_for(sources):
    source, config = sources[0]["train"], sources[1].copy_and_resolve_references()
    config.sampling = "class_aware"
    batches = steps((sources[0], config), 2, seed=3)
    expected = class_aware(source.labels, 3, 0)[:8]
    np.testing.assert_array_equal([i for b in batches for i in b["index"]], expected)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_reads_beside_each_other_change_nothing(sources, on_error):
    config = sources[1].copy_and_resolve_references()
    config.on_error = on_error
    plain = steps((sources[0], config), 4)
    config.parallel_reads = 4096  # more than there are processors
    for one, other in zip(plain, steps((sources[0], config), 4), strict=True):
        assert_same(one, other)


def test_no_more_files_are_read_at_once_than_asked_for(tmp_path):
    config = tree(tmp_path, num_train=16)
    source = annotations.load(config)["train"]
    lock, now, most = threading.Lock(), [0], [0]

    def read(index):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        return open(source.names[index], "rb").read()

    def encoded(index):
        return tf.reshape(tf.numpy_function(read, [index], tf.string, False), [])

    for reads in (1, 4):
        config.parallel_reads, most[0] = reads, 0
        list(steps(({"train": replace(source, encoded=encoded)}, config), 4))
        assert most[0] == reads


def test_pictures_depend_on_the_seed(tmp_path):
    """Not only which come: a picture that comes in both is cropped otherwise."""
    config = tree(tmp_path, num_train=4, num_val=1)
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"train/{i}.png")
    config.crop_area = 0.3
    source = annotations.load(config), config
    one, other = (
        {int(i): p for i, p in zip(b["index"], b["image"], strict=True)}
        for b in (steps(source, 1, seed=seed)[0] for seed in (0, 1))
    )
    assert one.keys() == other.keys() == set(range(4))
    assert all((one[i] != other[i]).any() for i in one)


def test_a_batch_depends_on_seed_and_step_alone(sources):
    whole = steps(sources, 7)
    for start in (1, 3, 6):
        assert_same(steps(sources, 1, start_step=start)[0], whole[start])
    assert (steps(sources, 1, seed=1)[0]["index"] != whole[0]["index"]).any()


def test_processes_share_the_global_batch(sources):
    whole = steps(sources, 5)
    parts = [steps(sources, 5, process_index=p, process_count=2) for p in (0, 1)]
    for at in range(5):
        both = {k: np.concatenate([p[at][k] for p in parts]) for k in whole[at]}
        assert_same(both, whole[at])
    with pytest.raises(ValueError, match="multiple"):
        steps(sources, 1, process_count=3)


def test_too_few_images(sources):
    with pytest.raises(UserError, match="batch_size=11 is more than the 10"):
        steps(sources, 1, batch_size=11)


@pytest.mark.parametrize("count", [1, 2])
def test_eval_gives_every_image_once_in_order(sources, count):
    source, config = sources[0]["val"], sources[1]
    parts = [
        list(
            pipeline.eval_batches(
                source,
                data_config=config,
                batch_size=4,
                process_index=p,
                process_count=count,
            )
        )
        for p in range(count)
    ]
    assert [len(p) for p in parts] == [2] * count
    rows = [
        {k: np.concatenate([p[at][k] for p in parts]) for k in parts[0][0]}
        for at in range(2)
    ]
    all_rows = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
    mask = all_rows["mask"]
    np.testing.assert_array_equal(mask, np.arange(8) < 5)
    np.testing.assert_array_equal(all_rows["index"][mask], np.arange(5))
    np.testing.assert_array_equal(all_rows["image"][mask][:, 0, 0, 0], np.arange(5))
    np.testing.assert_array_equal(all_rows["labels"][mask], source.labels)
    assert (all_rows["labels"][~mask] == -1).all() and all_rows["ok"].all()


@pytest.mark.parametrize("antialias", [True, False])
def test_resize_agrees_with_pil(tmp_path, antialias):
    pixels = blocks(height=64, width=40)
    (tmp_path / "0.png").write_bytes(encode(pixels, "PNG"))
    write_json(tmp_path / "val.json", ["a"], [["0.png", []]])
    source = annotations.read(tmp_path / "val.json", "val", 10**6)
    # PIL always antialiases; where nothing shrinks both do the same.
    size = 16 if antialias else 96
    config = data_config(image_size=size, antialias=antialias)
    batch = next(pipeline.eval_batches(source, data_config=config, batch_size=1))
    expected = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    difference = batch["image"][0].astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


@pytest.fixture
def damaged(tmp_path):
    """12 images: 3 truncated, 7 not there any more, 8 too large."""
    config = tree(tmp_path, num_train=12)
    config.max_pixels = 1000
    source = annotations.load(config)["train"]
    names = source.names
    truncated = encode(blocks(height=20, width=20))[:-10]
    for at, content in ((3, truncated), (8, encode(blocks(), "PNG"))):
        with open(names[at], "wb") as file:
            file.write(content)
    (tmp_path / "train/7.png").unlink()
    return source, config


def test_unreadable_images_are_skipped(damaged):
    source, config = damaged
    config.on_error = "skip"
    batches = pipeline.train_batches(source, data_config=config, batch_size=4, seed=0)
    order = np.concatenate([permutation(12, 0, epoch) for epoch in range(3)])
    for step in range(9):
        batch = next(batches)
        index = order[4 * step : 4 * step + 4]
        ok = ~np.isin(index, [3, 7, 8])
        np.testing.assert_array_equal(batch["index"], index)
        np.testing.assert_array_equal(batch["ok"], ok)
        np.testing.assert_array_equal(batch["image"][ok][:, 0, 0, 0], index[ok])
        assert not batch["image"][~ok].any()
        np.testing.assert_array_equal(batch["labels"][ok], source.labels[index[ok]])
        assert (batch["labels"][~ok] == -1).all()
    # Evaluation: whatever the order, the same rows.
    rows = list(pipeline.eval_batches(source, data_config=config, batch_size=5))
    ok = np.concatenate([r["ok"] for r in rows])
    assert list(np.flatnonzero(~ok)) == [3, 7, 8]
    assert sum(r["mask"].sum() for r in rows) == 12


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        (3, "cannot be read .*JPEG"),
        (7, "No such file"),
        (8, "53 x 40 pixels, more than data.max_pixels = 1000"),
    ],
)
def test_unreadable_images_stop_with_their_name(damaged, at, reason):
    source, config = damaged
    part = source.take([0, at, 1])
    batches = pipeline.eval_batches(part, data_config=config, batch_size=2)
    with pytest.raises(UserError, match=reason) as error:
        list(batches)
    assert source.names[at] in str(error.value) and "\n" not in str(error.value)
    assert "data.on_error=skip" in str(error.value)


def test_unknown_policy(sources):
    config = sources[1].copy_and_resolve_references()
    config.on_error = "ignore"
    with pytest.raises(UserError, match="choose stop or skip"):
        next(pipeline.eval_batches(sources[0]["val"], data_config=config, batch_size=2))


# Its rows are slow to draw: they are asked for when Python ends.
UNFINISHED = """
import sys, time
from data_trees import data_config
from mljax.data import annotations, order, pipeline
draws = order.draws
order.draws = lambda *a: (time.sleep(a[1] * 0.2), draws(*a))[1]
config = data_config(sys.argv[1])
batches = pipeline.train_batches(
    annotations.load(config)["train"], data_config=config, batch_size=4, seed=0)
next(batches)
print("done")
"""


def test_a_program_ends_in_the_middle_of_its_batches(tmp_path):
    tree(tmp_path, num_train=10)
    command = [sys.executable, "-c", UNFINISHED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
