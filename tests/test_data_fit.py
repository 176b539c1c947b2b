"""From a picture to the batch's size: the same with and without TensorFlow."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from data_trees import blocks, data_config, encode, write_json
from PIL import Image

from mljax import images
from mljax.data import annotations, decode, fit, pipeline
from mljax.data.decode_part import decode_part

SIZES = [(120, 200), (401, 97), (333, 500), (40, 61), (48, 64)]
FITS = ["stretch", "letterbox", "crop"]


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture in which every place can be told from every other."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    big = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(big)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of many sizes: JPEG, PNG, and JPEGs that lie on their side."""
    root = tmp_path_factory.mktemp("photos")
    entries = []
    for i, size in enumerate(SIZES):
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = smooth(*size, seed=i)
        for name, data in (
            (f"{i}.jpg", encode(pixels, quality=95)),
            (f"{i}.png", encode(pixels, "PNG")),
            (f"{i} turned.jpg", encode(pixels, quality=95, exif=exif)),
            (f"{i} grey.jpg", encode(Image.fromarray(pixels).convert("L"))),
        ):
            (root / name).write_bytes(data)
            entries.append([name, ["a"]])
    write_json(root / "train.json", ["a"], entries)
    return root


def evaluated(folder, config):
    source = annotations.read(folder / "train.json", "val", config.max_pixels)
    batches = pipeline.eval_batches(source, data_config=config, batch_size=len(source))
    return source, next(batches)["image"]


@pytest.mark.parametrize("how", FITS)
@pytest.mark.parametrize(
    ("resize", "scaled"), [("bilinear", 1.0), ("area", 2.0), ("antialias", 0.0)]
)
def test_prediction_prepares_pictures_as_evaluation_does(folder, how, resize, scaled):
    config = data_config(
        folder,
        image_size=(48, 64),
        fit=how,
        resize="area" if resize == "area" else "bilinear",
        antialias=resize == "antialias",
        scaled_decode=scaled,
    )
    source, found = evaluated(folder, config)
    for name, pixels in zip(source.names, found, strict=True):
        expected = images.load(name, config).astype(int)
        assert expected.shape == (48, 64, 3)
        difference = np.abs(pixels - expected)
        assert difference.max() <= 3 and difference.mean() < 0.5, name


def test_a_thin_picture_is_read(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encode(smooth(600, 3)))
    write_json(tmp_path / "train.json", ["a"], [["0.jpg", ["a"]]])
    config = data_config(tmp_path, image_size=64, fit="letterbox", scaled_decode=1.0)
    source, (found,) = evaluated(tmp_path, config)
    expected = images.load(source.names[0], config)
    # One column, between bars.
    for pixels in (found, expected):
        assert (pixels == images.GREY).all(2).sum() == 63 * 64


def test_letterbox_shows_all_and_crop_the_middle(folder):
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:200] = 255
    config = data_config(image_size=(60, 90), fit="letterbox")
    boxed = images.load(pixels, config)
    assert (boxed[:15] == images.GREY).all() and (boxed[-15:] == images.GREY).all()
    assert (boxed[16:44, 32:58] == 255).all() and not boxed[16:44, :28].any()
    config = data_config(image_size=(60, 60), fit="crop")
    assert (images.load(pixels, config) == 255).all()


def decoded(data: bytes, config, draws=None) -> np.ndarray:
    """What training makes of one file, with these random numbers."""

    class Fake:
        encoded = True

    prepare = fit.make_prepare(Fake(), config, train=draws is not None)
    numbers = np.asarray([draws or [0.0] * fit.NUM_DRAWS], np.float32)
    numbers = fit.shape_crops(numbers, config)[0]
    run = tf.function(lambda d: prepare(tf.constant(0), d, numbers), autograph=False)
    return run(data).numpy()


@pytest.mark.parametrize("name", [*FITS, "turned", "png"])
def test_a_random_crop_is_a_part_of_the_picture(name):
    """Decoding only the box gives what cutting it out of the whole gives."""
    pixels = smooth(300, 420)
    exif = Image.Exif()
    exif[0x0112] = 6 if name == "turned" else 1
    form = "PNG" if name == "png" else "JPEG"
    data = encode(pixels, form, exif=exif)
    upright = decode.decode(data, 10**6).numpy()
    config = data_config(
        image_size=(32, 48), crop_area=0.2, scaled_decode=0.0, crop_ratio=1.5
    )
    config.fit = name if name in FITS else "stretch"
    rng = np.random.default_rng(1)
    for _ in range(6):
        draws = rng.random(fit.NUM_DRAWS).tolist()
        found = decoded(data, config, draws).astype(int)
        size = np.array(upright.shape[:2])
        area = size.prod() * (0.2 + 0.8 * draws[0])
        shape = 1.5 * 1.5 ** (2 * draws[1] - 1)
        sides = np.clip(
            np.round([np.sqrt(area / shape), np.sqrt(area * shape)]), 1, size
        )
        sides = sides.astype(int)
        first = (np.array(draws[2:4]) * (size - sides + 1)).astype(int)
        if config.fit == "crop":
            height = min(sides[0], round(sides[1] / 1.5))
            width = min(sides[1], round(sides[0] * 1.5))
            room = sides - [height, width]
            first = first + (np.array(draws[4:6]) * (room + 1)).astype(int)
            sides = np.array([height, width])
        part = upright[first[0] :, first[1] :][: sides[0], : sides[1]]
        if config.fit == "crop":
            config_whole = data_config(image_size=(32, 48))
        else:
            config_whole = data_config(image_size=(32, 48), fit=config.fit)
        expected = images.load(part, config_whole)
        difference = np.abs(found - expected)
        # Where the box ends, colours are spread over two pixels within it only.
        assert difference.mean() < 1 and np.mean(difference > 8) < 0.01


def test_crops_have_the_areas_and_shapes_asked_for():
    config = data_config(image_size=32, crop_area=0.25)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        draws = fit.shape_crops(rng.random((1, 6), np.float32), config)[0]
        box = fit._random_box(tf.constant([400, 300]), draws).numpy()
        assert (box >= 0).all() and (box[2:] >= 1).all()
        assert box[0] + box[2] <= 400 and box[1] + box[3] <= 300
        found.append(box)
    found = np.array(found)
    share = found[:, 2] * found[:, 3] / (400 * 300)
    shape = found[:, 3] / found[:, 2]
    assert 0.24 < share.min() < 0.3 and share.max() > 0.9
    whole = found[:, 3] < 300  # the others were cut to the picture's width
    assert 0.74 < shape[whole].min() and shape.max() < 1.35
    assert found[:, 0].min() == 0 and found[:, 1].std() > 10


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_box_of_a_jpeg_has_the_pixels_of_the_whole(subsampling):
    noise = np.random.default_rng(0).integers(0, 256, (61, 103, 3), np.uint8)
    data = encode(noise, quality=90, subsampling=subsampling)
    whole = decode.decode(data, 10**6).numpy()
    for left, width in ((0, 103), (0, 20), (13, 32), (16, 16), (32, 71), (47, 1)):
        box = tf.constant([5, left, 40, width])
        found = decode_part(data, 10**6, lambda size, box=box: (box, tf.constant(0)))
        np.testing.assert_array_equal(found, whole[5:45, left : left + width])


def test_whole_pictures_are_decoded_to_the_same_pixels():
    """The default setting changes nothing where a picture is not several times larger
    than what is needed."""
    data = encode(blocks(height=40, width=60))
    exact = decoded(data, data_config(image_size=24, scaled_decode=0.0))
    np.testing.assert_array_equal(decoded(data, data_config(image_size=24)), exact)
    exact = decoded(data, data_config(image_size=10, scaled_decode=0.0))
    assert (
        decoded(data, data_config(image_size=10)) != exact
    ).any()  # 40 >= 2 x 2 x 10


@pytest.mark.parametrize(
    ("size", "how", "level"),
    [
        ((400, 400), "stretch", 0),
        ((448, 448), "stretch", 0),
        ((896, 895), "stretch", 0),
        ((896, 896), "stretch", 1),
        ((3584, 4000), "stretch", 3),
        ((896, 300), "letterbox", 1),
        ((300, 700), "letterbox", 0),
    ],
)
def test_reductions(size, how, level):
    config = data_config(image_size=448, scaled_decode=1.0, fit=how)
    config.scaled_decode = 1.0
    found = fit._level(tf.constant(size), (448, 448), config)
    assert found == level and images._reduction(size, (448, 448), config) == 2**level


def test_truncated_files_are_errors_wherever_the_crop_is():
    data = encode(smooth(200, 200))
    config = data_config(image_size=32, crop_area=0.05)
    top = [0.0, 0.5, 0.0, 0.0, 0.0, 0.0]  # a small crop of the first rows
    assert decoded(data, config, top).shape == (32, 32, 3)
    for cut in (0.5, 0.9, 0.999):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decoded(data[: int(len(data) * cut)], config, top)


def test_training_batches_are_cropped_in_ways_of_their_own(folder):
    config = data_config(folder, image_size=32, crop_area=0.3)
    source = annotations.read(folder / "train.json", "train", config.max_pixels)
    batches = pipeline.train_batches(
        source, data_config=config, batch_size=len(source), seed=0
    )
    epochs = []
    for batch in itertools.islice(batches, 2):
        epochs.append(batch["image"][np.argsort(batch["index"])])
    different = (epochs[0] != epochs[1]).any((1, 2, 3))
    assert different.all()
