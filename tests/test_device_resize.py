"""Resizing on the device gives what resizing on the host gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_trees import data_config, encode, write_json
from PIL import Image
from runs import TINY, run

from mljax import config as configs
from mljax import sharding
from mljax.data import annotations, device_resize, pipeline
from mljax.errors import UserError
from mljax.run import make_place, sized_batches

CANVAS = 96
# Smaller and larger than the target, of its very size, and as large as the canvas.
SIZES = [(20, 31), (48, 64), (90, 60), (96, 96), (64, 30), (13, 96)]
FITS = ["stretch", "letterbox", "crop"]


def photos(root, sizes):
    rng = np.random.default_rng(0)
    entries = []
    for i, (height, width) in enumerate(sizes):
        small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
        pixels = small.resize((width, height), Image.Resampling.BICUBIC)
        (root / f"{i}.png").write_bytes(encode(pixels, "PNG"))
        entries.append([f"{i}.png", ["a"]])
    write_json(root / "train.json", ["a"], entries)
    return root


def batches(config, count):
    file = f"{config.root}/train.json"
    source = annotations.read(file, "train", config.max_pixels)
    stream = pipeline.train_batches(
        source, data_config=config, batch_size=len(source), seed=0
    )
    return list(itertools.islice(stream, count))


def on_device(config, batch):
    resize = jax.jit(device_resize.make_resize(config))
    return np.asarray(resize(batch["image"], batch["size"])).astype(int)


@pytest.mark.parametrize("how", FITS)
@pytest.mark.parametrize("kind", ["bilinear", "area", "antialias"])
@pytest.mark.parametrize("crop", [1.0, 0.3])
def test_the_same_pixels_as_from_the_host(tmp_path, how, kind, crop):
    config = data_config(
        photos(tmp_path, SIZES),
        image_size=(48, 64),
        fit=how,
        resize="area" if kind == "area" else "bilinear",
        antialias=kind == "antialias",
        crop_area=crop,
    )
    (host,) = batches(config, 1)
    config.resize_on_device = CANVAS
    (sent,) = batches(config, 1)
    assert sent["image"].shape == (len(SIZES), CANVAS, CANVAS, 3)
    np.testing.assert_array_equal(sent["index"], host["index"])
    found = on_device(config, sent)
    assert found.shape == (len(SIZES), 48, 64, 3)
    difference = np.abs(found - host["image"])
    # Half-way between two values, as many means of four are, they may round apart.
    assert difference.max() <= 1 and difference.mean() < 0.03
    if crop == 1 and how != "crop":
        sizes = np.array(SIZES)[sent["index"]]
        np.testing.assert_array_equal(sent["size"], sizes)


@pytest.mark.parametrize("how", FITS)
def test_what_is_larger_than_the_canvas_is_made_smaller_first(tmp_path, how):
    root = photos(tmp_path, [(200, 150), (60, 300), (97, 96)])
    config = data_config(root, image_size=(48, 64), fit=how)
    (host,) = batches(config, 1)
    config.resize_on_device = CANVAS
    (sent,) = batches(config, 1)
    assert sent["size"].max() <= CANVAS
    if how == "letterbox":  # the aspect is what the device goes by
        ratios = {0: 4 / 3, 1: 1 / 5, 2: 97 / 96}
        for index, (height, width) in zip(sent["index"], sent["size"], strict=True):
            assert height / width == pytest.approx(ratios[int(index)], rel=0.03)
    difference = np.abs(on_device(config, sent) - host["image"])
    assert difference.mean() < 2


def test_an_unreadable_picture_is_black(tmp_path):
    photos(tmp_path, SIZES)
    (tmp_path / "2.png").write_bytes(b"not an image")
    config = data_config(
        tmp_path,
        image_size=(48, 64),
        fit="letterbox",
        on_error="skip",
        resize_on_device=CANVAS,
    )
    for batch in batches(config, 2):  # read one by one, and known to be unreadable
        at = int(np.flatnonzero(batch["index"] == 2)[0])
        assert not batch["ok"][at] and batch["ok"].sum() == len(SIZES) - 1
        assert not on_device(config, batch)[at].any()


def test_evaluation_resizes_as_ever(tmp_path):
    config = data_config(photos(tmp_path, SIZES), image_size=(48, 64))
    config.resize_on_device = CANVAS
    file = tmp_path / "train.json"
    source = annotations.read(file, "val", config.max_pixels)
    found = next(pipeline.eval_batches(source, data_config=config, batch_size=6))
    assert "size" not in found and found["image"].shape == (6, 48, 64, 3)


def test_steps_get_their_rows_of_one_size(tmp_path):
    config = configs.common()
    config.data = data_config(
        photos(tmp_path, SIZES + SIZES[:2]), image_size=(48, 64), fit="stretch"
    )
    config.data.resize_on_device = CANVAS
    (sent,) = batches(config.data, 1)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    placed = make_place(config, mesh)(sent)
    assert placed.keys() == {"image", "labels"}
    rows = sharding.batch_sharding(mesh)
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(rows, array.ndim), name
    np.testing.assert_array_equal(placed["image"], on_device(config.data, sent))
    np.testing.assert_array_equal(placed["labels"], sent["labels"])


def test_nothing_is_sent_between_devices():
    config = configs.common()
    config.data.image_size, config.data.resize_on_device = 32, 48
    rows = sharding.batch_sharding(sharding.make_mesh(data=4, fsdp=2))
    batch = {
        "image": jax.ShapeDtypeStruct((16, 48, 48, 3), jnp.uint8, sharding=rows),
        "size": jax.ShapeDtypeStruct((16, 2), jnp.int32, sharding=rows),
    }
    sized = jax.jit(sized_batches(config), out_shardings=rows)
    text = sized.lower(batch).compile().as_text()
    assert not [w for w in ("all-", "permute", "reduce-scatter") if w in text]


def test_a_run_is_the_same_where_nothing_is_to_be_resized(tmp_path, own_cache):
    """Drawn pictures have the model's size: the canvas only carries them."""
    folders = [tmp_path / "host", tmp_path / "device"]
    for folder, canvas in zip(folders, (0, 80), strict=True):
        flag = f"--config.data.resize_on_device={canvas}"
        done = run(folder, own_cache, *TINY, "--config.epochs=1", flag)
        assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "metrics.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"resize_on_device": 200},
            "at least the 224 pixels of config.data.image_size",
        ),
        ({"resize_on_device": -1}, "must be 0 to 4096 (pixels)"),
        (
            {"resize_on_device": 320, "randaugment.n": 2},
            "config.data.randaugment.n = 2",
        ),
    ],
)
def test_mistakes_name_the_key(changes, words):
    config = configs.common()
    config.data.root, config.data.image_size = "photos", (96, 224)
    config.data.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        configs.validate(config)
    assert str(error.value).startswith("config.data.resize_on_device = ")
    assert words in str(error.value) and "\n" not in str(error.value)
