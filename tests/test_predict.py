"""Predictions from a checkpoint: the same as evaluation's, and every kind of file."""

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import test_data_decode
from flax import nnx
from PIL import Image
from runs import ROOT

from mljax import config as configs
from mljax import decision, images, losses, models, predict, step
from mljax.checkpoint import FORMAT, Checkpoints
from mljax.config import common
from mljax.data import augment
from mljax.data.decode import decode
from mljax.errors import UserError
from mljax.models.functional import as_function, split
from mljax.prediction_files import Row, writer

NAMES = ["a,b", "cat", "dog", "été"]


def draw(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A work directory as training leaves it, with random weights."""
    config = common()
    config.model.backbone = "vit_tiny_patch16_224"
    config.data.image_size = 32
    config.data.max_pixels = 1_000_000
    model = models.build_model(
        config.model,
        len(NAMES),
        angular=True,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    params, batch_stats = split(model)
    folder = tmp_path_factory.mktemp("run")
    saved = Checkpoints(folder / "best")
    weights = {"params": params, "batch_stats": batch_stats}
    saved.save(7, weights, {"config": config.to_dict(), "class_names": NAMES})
    saved.close()
    return folder, model, config


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos é"
    (folder / "below").mkdir(parents=True)
    Image.fromarray(draw(0)).save(folder / "1.PNG")
    Image.fromarray(draw(1)).save(folder / "2 b.jpg")
    Image.fromarray(draw(2)).save(folder / "below" / "3.webp", lossless=True)
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.jpg").write_bytes(b"")
    whole = (folder / "2 b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (2000, 2000)).save(folder / "large.png")
    (folder / "notes.txt").write_text("not asked for")
    return folder


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(40, 50), (500, 37), (20, 31), (32, 32)])
def test_resize_is_tensorflows(size, antialias):
    image = draw(3, *size)
    expected = tf.image.resize(image, [32, 32], "bilinear", antialias=antialias)
    expected = tf.saturate_cast(tf.round(expected), tf.uint8).numpy()
    actual = images.resize(image, 32, antialias)
    # The same sums in another order: one level apart where they end near a half.
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 1 and np.mean(difference > 0) < 1e-3


@pytest.mark.parametrize("name", sorted(test_data_decode.FILES))
def test_files_are_read_as_in_training(name, tmp_path):
    data = test_data_decode.FILES[name]
    file = tmp_path / "image"
    file.write_bytes(data)
    expected = decode(tf.constant(data), 10**6).numpy()
    difference = np.abs(images.read(file, 10**6).astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(draw(5)).save(tmp_path / "a.jpg", exif=exif)
    expected = decode(tf.io.read_file(str(tmp_path / "a.jpg")), 10**6).numpy()
    difference = images.read(tmp_path / "a.jpg", 10**6).astype(int) - expected
    assert np.abs(difference).max() <= 2


def test_rotation_that_training_does_not_see_is_not_applied():
    """In XMP, and of another type than the standard's."""
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    long = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHLL", 0x0112, 4, 1, 6)
    for options in ({"xmp": xmp}, {"exif": long + bytes(4)}):
        data = test_data_decode.encode(draw(5), **options)
        expected = decode(tf.constant(data), 10**6).numpy()
        assert np.abs(images.read(data, 10**6).astype(int) - expected).max() <= 2


def test_only_what_training_reads_is_an_image(tmp_path):
    for form in ("EPS", "TIFF", "PPM"):
        Image.fromarray(draw(5)).save(tmp_path / "a.jpg", format=form)
        with pytest.raises(images.UnreadableImage, match="not an image of a known"):
            images.read(tmp_path / "a.jpg", 10**6)


def test_the_bytes_of_a_file_are_an_image(photos):
    data = (photos / "2 b.jpg").read_bytes()
    from_file = images.read(photos / "2 b.jpg", 10**6)
    np.testing.assert_array_equal(images.read(data, 10**6), from_file)


def test_probabilities_are_those_of_evaluation(checkpoint):
    folder, model, config = checkpoint
    given = np.stack([draw(i, 32, 32) for i in range(5)])
    evaluate = step.make_eval_step(as_function(model), augment.normalise)
    expected = losses.probabilities(evaluate(*split(model), given), config.loss)
    for path in (folder, folder / "best" / "7"):
        predictor = predict.load(path, batch_size=2)
        assert predictor.class_names == NAMES
        found = predictor.predict(given)
        assert found.shape == (5, 4) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    names = predictor.labels(given[:1], threshold=0.0)[0]
    assert names == [NAMES[i] for i in np.argsort(-found[0])]
    assert predictor.labels(given, threshold=0.999) == [[]] * 5
    assert predictor.predict([]).shape == (0, 4)


def test_kinds_of_images_in_python(checkpoint, photos):
    predictor = predict.load(checkpoint[0])
    file, pixels = photos / "1.PNG", draw(0)
    mixed = predictor.predict([str(file), file, Image.fromarray(pixels), pixels])
    np.testing.assert_allclose(mixed, np.tile(mixed[:1], (4, 1)), atol=1e-6)
    arrays = pixels, jnp.asarray(pixels), tf.constant(pixels)
    for single in (file, str(file), Image.fromarray(pixels), *arrays):
        found = predictor.predict(single)
        np.testing.assert_allclose(found, mixed[:1], atol=1e-6)
    grey = Image.fromarray(pixels).convert("L")
    grey_row, *others = predictor.predict([grey, *(grey.convert(m) for m in "IF")])
    assert np.ptp(grey_row) > 0
    np.testing.assert_allclose(others, [grey_row] * 2, atol=1e-6)
    cut = Image.open(photos / "cut.jpg")  # PIL decodes it when it must
    for bad, name in (
        ([photos / "cut.jpg"], "cut.jpg"),
        (cut, r"^images\[0\]"),
        ([pixels, np.zeros((4, 4, 3))], r"^images\[1\]"),
        ([photos / "none.jpg"], "none.jpg"),
    ):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            predictor.predict(bad)


def run(checkpoint, *arguments: object) -> int:
    return predict.main([f"--checkpoint={checkpoint[0]}", *map(str, arguments)])


def test_csv_of_a_folder(checkpoint, photos, tmp_path, capsys):
    output, show = tmp_path / "out.csv", tmp_path / "sheet.png"
    arguments = ("--images", photos, "--output", output, "--show", show)
    assert run(checkpoint, *arguments, "--threshold=0.1") == 0
    printed = capsys.readouterr()
    assert "7 images, 4 could not be read" in printed.out
    assert printed.err.count("cannot be read") == 4
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "labels", *NAMES, "error"]
    good = [row for row in rows if not row["error"]]
    assert [row["path"][-6:] for row in good] == ["/1.PNG", "2 b.jpg"[1:], "3.webp"]
    expected = predict.load(checkpoint[0]).predict([row["path"] for row in good])
    for row, p in zip(good, expected, strict=True):
        np.testing.assert_allclose([float(row[n]) for n in NAMES], p, atol=1e-5)
        chosen = {n for n, value in zip(NAMES, p, strict=True) if value > 0.1}
        assert set(filter(None, row["labels"].split(";"))) == chosen
    reasons = {row["path"].rpartition("/")[2]: row["error"] for row in rows}
    assert "2000 x 2000 pixels" in reasons["large.png"]
    assert "truncated" in reasons["cut.jpg"]
    assert "known format" in reasons["text.jpg"] and reasons["zero.jpg"]
    with Image.open(show) as picture:
        assert picture.width > 300

    before = output.read_bytes()
    assert run(checkpoint, *arguments) == 1  # nothing is overwritten
    assert "exists" in capsys.readouterr().err and output.read_bytes() == before
    assert run(checkpoint, *arguments, "--overwrite") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="where a name is any bytes")
@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_a_file_name_that_is_not_utf8(checkpoint, photos, tmp_path, kind):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(photos / "1.PNG", os.fsencode(folder) + b"/b\xff.png")
    output = tmp_path / f"out.{kind}"
    assert run(checkpoint, "--images", folder, "--output", output) == 0
    assert r"b\udcff.png" in output.read_text(encoding="utf-8")


def test_class_names_that_a_csv_file_has_its_own_use_for(tmp_path):
    names = ["path", "a;b", "labels", "error", "ü"]
    with writer(str(tmp_path / "out.csv")) as file:
        file.begin(names)
        file.add(Row("x.jpg", np.arange(5, dtype=np.float32) / 8, ""), ["ü", "a;b"])
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["path"] == "x.jpg" and row["error"] == "" and row["p(path)"] == "0.0"
    assert json.loads(row["labels"]) == ["ü", "a;b"] and row["p(error)"] == "0.375"
    assert len(row) == 8


def test_json_and_lists(checkpoint, photos, tmp_path):
    listed = photos / "list.txt"
    listed.write_text("below/3.webp\n\n1.PNG\nmissing.jpg\n")
    assert run(checkpoint, "--images", listed, "--output", tmp_path / "a.jsonl") == 0
    lines = [json.loads(x) for x in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [set(x) for x in lines] == [{"path", "labels", "probabilities"}] * 2 + [
        {"path", "error"}
    ]
    pattern = f"{photos}/*.PNG"
    assert run(checkpoint, "--images", pattern, "--output", tmp_path / "a.json") == 0
    (only,) = json.loads((tmp_path / "a.json").read_text())
    # Alone as well: a batch of another size may end with another last digit.
    listed.write_text("1.PNG\n")
    assert run(checkpoint, "--images", listed, "--output", tmp_path / "b.jsonl") == 0
    assert only == json.loads((tmp_path / "b.jsonl").read_text())
    assert (only["path"], only["labels"]) == (lines[1]["path"], lines[1]["labels"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--images": "{tmp}/empty"}, ["empty", "has no images"]),
        ({"--images": "{tmp}/none*"}, ["none*", "matches nothing"]),
        ({"--images": "{photos}/zero.jpg"}, ["none of the images could be read"]),
        ({"--images": "{tmp}/train.json"}, ["train.json", "name the folder"]),
        ({"--output": "{tmp}/out.xml"}, ["out.xml", ".csv, .json, .jsonl"]),
        ({"--output": "{tmp}/no/out.csv"}, ["no/out.csv", "No such file"]),
        ({"--checkpoint": "{tmp}/empty"}, ["holds no checkpoint"]),
        ({"--checkpoint": "{tmp}/newer"}, ["newer", "upgrade mljax"]),
        ({"--checkpoint": "{tmp}/half"}, ["half", "not copied whole"]),
        ({"--show": "{tmp}/no/sheet.png"}, ["--show", "no/sheet.png", "be written"]),
        ({"--threshold": "1"}, ["--threshold"]),
        ({"--batch-size": "0"}, ["batch_size"]),
    ],
)
def test_mistakes_are_one_line(checkpoint, photos, tmp_path, capsys, change, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.json").write_text("[]")
    newer = Checkpoints(tmp_path / "newer")
    newer.save(1, {"params": {}, "batch_stats": {}}, {"format": FORMAT + 1})
    newer.close()
    half = tmp_path / "half"
    subprocess.run(["cp", "-r", checkpoint[0], half], check=True)
    for file in (half / "best" / "7").rglob("*"):
        if file.is_file() and "METADATA" not in file.name.upper():
            os.truncate(file, file.stat().st_size // 2)
    flags = {
        "--checkpoint": str(checkpoint[0]),
        "--images": str(photos),
        "--output": str(tmp_path / "out.csv"),
        "--show": str(tmp_path / "sheet.png"),
    }
    for flag, value in change.items():
        flags[flag] = value.format(tmp=tmp_path, photos=photos)
    assert predict.main([f"{flag}={value}" for flag, value in flags.items()]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last
    done = change == {"--images": "{photos}/zero.jpg"}  # a row with the reason
    assert (tmp_path / "out.csv").exists() == done


def unlink(name):
    return lambda step: (step / name).unlink()


def replace(name, before, after):
    def change(step):
        data = (step / name).read_bytes()
        assert before in data
        (step / name).write_bytes(data.replace(before, after))

    return change


ABOUT = "_CHECKPOINT_METADATA"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unlink(ABOUT), "_CHECKPOINT_METADATA is missing"),
        (lambda step: os.truncate(step / ABOUT, 40), "was not copied whole"),
        (replace(ABOUT, b'"format": 1', b'"format": 0'), "is not a checkpoint"),
        (replace(ABOUT, b'"format": 1', b'"format": "a"'), "is not a checkpoint"),
        (replace(ABOUT, b'"vit_tiny', b'"vot_tiny'), "another version of mljax"),
        (lambda step: shutil.rmtree(step / "state"), "was not copied whole"),
        (lambda step: shutil.rmtree(step / "state" / "d"), "was not copied whole"),
        (unlink("state/manifest.ocdbt"), "was not copied whole"),
        (unlink("state/_METADATA"), "was not copied whole"),
        (
            lambda step: (step / decision.FILE).write_bytes(b"\xff\xfe\x00"),
            "delete it",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named(checkpoint, tmp_path, change, words):
    step = tmp_path / "run" / "best" / "7"
    shutil.copytree(checkpoint[0] / "best" / "7", step)
    change(step)
    with pytest.raises(UserError) as caught:
        predict.load(tmp_path / "run")
    text = str(caught.value)
    assert words in text and str(step) in text and "\n" not in text, text


def test_a_picture_too_large_for_pil_is_too_large_for_us():
    """20,000 x 20,000 pixels: PIL refuses it, and speaks of an attack."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 20_000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT"):
        data += struct.pack(">I", len(chunk) - 4) + chunk
        data += struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(images.TooLarge) as caught:
        images.read(data, 10**6)
    assert str(caught.value) == (
        "400000000 pixels, more than data.max_pixels = 1000000"
    )


def test_needs_no_tensorflow(checkpoint):
    code = (
        "import sys; from mljax import predict; import numpy as np;"
        f"model = predict.load({str(checkpoint[0])!r});"
        "print(model.predict(np.zeros((1, 40, 40, 3), np.uint8)).shape);"
        "sys.exit('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_mirror_images_have_a_say(checkpoint):
    _, model, config = checkpoint
    given = np.stack([draw(i, 32, 32) for i in range(3)])
    evaluate = step.make_eval_step(as_function(model), augment.normalise, flip=True)
    expected = losses.probabilities(evaluate(*split(model), given), config.loss)
    stored = config.to_dict()
    stored["eval"]["flip"] = True
    about = {"class_names": NAMES, "config": stored}
    found = predict.from_model(model, about, decision.default(len(NAMES))).predict(
        given
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    stored["eval"]["flip"] = False
    assert (
        np.abs(
            predict.from_model(model, about, decision.default(len(NAMES))).predict(
                given
            )
            - found
        )
        > 1e-5
    ).any()


def test_pictures_that_are_not_square(checkpoint):
    _, model, config = checkpoint
    stored = config.to_dict()
    stored["data"].update(image_size=[32, 48], fit="letterbox")
    about = {"class_names": NAMES, "config": json.loads(json.dumps(stored))}
    found = predict.from_model(model, about, decision.default(len(NAMES))).predict(
        [draw(0, 90, 60)]
    )
    data = configs.from_dict(stored).data
    pixels = images.load(draw(0, 90, 60), data)[None]
    assert pixels.shape == (1, 32, 48, 3)
    evaluate = step.make_eval_step(as_function(model), augment.normalise)
    expected = losses.probabilities(evaluate(*split(model), pixels), config.loss)
    np.testing.assert_allclose(found, expected, atol=1e-6)
