"""RandAugment, operation by operation beside PIL."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from mljax.data import randaugment
from mljax.data.randaugment import OPERATIONS

PHOTO = load_sample_image("china.jpg")[60:260, 100:349]  # uint8 [200, 249, 3]
DULL = (PHOTO // 3 + 40).astype(np.uint8)  # for AutoContrast, not 0 to 255 already
FILL = (128, 128, 128)
MAGNITUDES = (1, 5, 9)


def value(first: float, last: float, magnitude: int) -> float:
    return float(np.linspace(first, last, 10)[magnitude])


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=FILL)


def square(image: Image.Image, m: int, place: tuple[float, float]) -> Image.Image:
    image, side = image.copy(), int(value(0, 20, m))
    y, x = (
        int(p * s) - side // 2 for p, s in zip(place, image.size[::-1], strict=True)
    )
    box = (x, y, x + side - 1, y + side - 1)
    ImageDraw.Draw(image).rectangle(box, (125, 122, 113))
    return image


def enhanced(kind):
    return lambda image, m, sign, place: kind(image).enhance(
        1 + sign * value(0, 0.9, m)
    )


# What the published method names, in PIL's words: (image, magnitude, sign, place).
PIL = {
    "Invert": lambda i, m, s, p: ImageOps.invert(i),
    "Cutout": lambda i, m, s, p: square(i, m, p),
    "Sharpness": enhanced(ImageEnhance.Sharpness),
    "Contrast": enhanced(ImageEnhance.Contrast),
    "Color": enhanced(ImageEnhance.Color),
    "Brightness": enhanced(ImageEnhance.Brightness),
    "AutoContrast": lambda i, m, s, p: ImageOps.autocontrast(i),
    "Posterize": lambda i, m, s, p: ImageOps.posterize(i, round(value(8, 4, m))),
    "ShearX": lambda i, m, s, p: affine(i, 1, s * value(0, 0.3, m), 0, 0, 1, 0),
    "ShearY": lambda i, m, s, p: affine(i, 1, 0, 0, s * value(0, 0.3, m), 1, 0),
    "TranslateX": lambda i, m, s, p: affine(
        i, 1, 0, s * value(0, 150 / 331, m) * i.width, 0, 1, 0
    ),
    "TranslateY": lambda i, m, s, p: affine(
        i, 1, 0, 0, 0, 1, s * value(0, 150 / 331, m) * i.height
    ),
    "Rotate": lambda i, m, s, p: i.rotate(s * value(0, 30, m), fillcolor=FILL),
    "Equalize": lambda i, m, s, p: ImageOps.equalize(i),
    "Solarize": lambda i, m, s, p: ImageOps.solarize(i, value(256, 0, m)),
}


def apply(name, image, magnitude, sign=1.0, place=(0.5, 0.5)):
    share = tf.constant(magnitude / 9, tf.float32)
    arguments = share, tf.constant(sign), tf.constant(place, tf.float32)
    return OPERATIONS[name](tf.constant(image), *arguments).numpy()


def test_there_are_fifteen():
    assert list(PIL) == list(OPERATIONS) and len(PIL) == 15


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", PIL)
def test_agrees_with_pil(name, sign):
    for image in (PHOTO, DULL):
        for magnitude in MAGNITUDES:
            place = (0.02 * magnitude, 0.97)
            expected = np.asarray(
                PIL[name](Image.fromarray(image), magnitude, sign, place), int
            )
            found = apply(name, image, magnitude, sign, place)
            assert found.dtype == np.uint8 and found.shape == image.shape
            difference = np.abs(found - expected).max(-1)
            # One level where a factor ends near a whole number; a pixel moves to
            # another place where it lies between two, in one of a thousand.
            moves = name in ("Rotate", "ShearX", "ShearY")
            assert difference.max() <= 1 or moves
            assert np.mean(difference > 0) < 1e-3


@pytest.mark.parametrize("name", PIL)
def test_every_operation_grows_with_its_magnitude(name):
    image = DULL
    changes = [
        np.abs(apply(name, image, m).astype(int) - image).mean() for m in (1, 5, 9)
    ]
    assert changes[0] >= 0 and changes[2] > 0
    if name not in ("Invert", "AutoContrast", "Equalize"):
        assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast"])
def test_a_picture_of_one_colour(name):
    image = np.full((8, 9, 3), (0, 90, 255), np.uint8)
    expected = np.asarray(PIL[name](Image.fromarray(image), 5, 1.0, (0, 0)), int)
    assert np.abs(apply(name, image, 5) - expected).max() <= 1


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_brightness_is_pils_to_the_level(sign):
    """Of every grey, where 1 - 0.6 in float32 is below 0.4."""
    image = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    for magnitude in range(1, 10):
        expected = PIL["Brightness"](Image.fromarray(image), magnitude, sign, None)
        found = apply("Brightness", image, magnitude, sign)
        np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(
    "name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
)
def test_both_directions_and_the_fill(name):
    left, right = (apply(name, PHOTO, 9, sign) for sign in (-1.0, 1.0))
    assert (left != right).any()
    for image in (left, right):
        assert (image == 128).all(-1).mean() > 0.02


@tf.function(autograph=False)
def several(draws, n, m, prob):
    image = tf.constant(PHOTO)
    return randaugment.randaugment(image, draws, n=n, m=m, prob=prob)


def drawn(number: float, done=0.0, strength=0.0, sign=0.9, y=0.5, x=0.5):
    """The random numbers that choose operation `number` of 15."""
    return [(number + 0.5) / 15, done, strength, sign, y, x]


def test_the_draws_choose():
    names = list(OPERATIONS)
    rotate, solarize = names.index("Rotate"), names.index("Solarize")
    for m, strength, magnitude in ((7, 0.0, 7), (0, 0.0, 1), (0, 0.999, 9)):
        draws = drawn(rotate, strength=strength, sign=0.2)
        draws += drawn(solarize, strength=strength)
        found = several(tf.constant(draws), 2, m, 0.5)
        expected = apply("Rotate", PHOTO, magnitude, -1.0)
        expected = apply("Solarize", expected, magnitude)
        np.testing.assert_array_equal(found, expected)
    draws = tf.constant(drawn(rotate, done=0.6) + drawn(0, done=0.4))
    np.testing.assert_array_equal(several(draws, 2, 5, 0.5), 255 - PHOTO)
    np.testing.assert_array_equal(several(draws, 2, 5, 0.3), PHOTO)
