"""Cutout and colour jitter on the device; the mean over mirror images."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image
from small_model import make, mlp

from mljax import step
from mljax.data.augment import make_augment, normalise, random_cutout, random_jitter
from mljax.sharding import batch_sharding, make_mesh

PHOTO = load_sample_image("flower.jpg")[100:164, 200:296]  # uint8 [64, 96, 3]


def photos(count):
    return np.repeat(PHOTO[None], count, 0)


def test_cutout_covers_a_part_with_one_colour():
    images = photos(200)
    cover = jax.jit(partial(random_cutout, probability=0.5, side=0.4))
    found = np.asarray(cover(images, jax.random.key(0)))
    assert found.dtype == np.uint8
    changed = (found != images).any(-1)
    covered = changed.any((1, 2))
    assert 70 < covered.sum() < 130
    sizes, colours = [], []
    for image, where in zip(found[covered], changed[covered], strict=True):
        rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert len(np.unique(box.reshape(-1, 3), axis=0)) == 1
        sizes.append(box.shape[:2])
        colours.append(box[0, 0])
    sizes, colours = np.array(sizes), np.array(colours)
    assert (sizes <= [26, 38]).all()  # 0.4 of 64 and of 96
    assert (sizes == [26, 38]).all(1).sum() > 10 and sizes.min() < 18  # cut off
    assert len(np.unique(colours, axis=0)) > 50
    assert 80 < colours.mean() < 180


def test_cutout_of_everything_and_nothing():
    rng = jax.random.key(1)
    cover = jax.jit(random_cutout)
    np.testing.assert_array_equal(cover(photos(20), rng, 0.0, 0.4), photos(20))
    whole = np.asarray(cover(photos(20), rng, 1.0, 1.0))
    share = (whole == whole[:, 32:33, 48:49]).all(-1).mean((1, 2))
    assert share.min() > 0.24 and share.max() > 0.7  # a quarter from a corner


@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_jitter_is_pils_with_another_factor_for_each_image(name, enhance):
    found = random_jitter(photos(16), jax.random.key(2), **{name: 0.6})
    factors = []
    image = Image.fromarray(PHOTO)
    for one in np.asarray(found).astype(int):
        # The factor that fits best is found by trying.
        tried = np.linspace(0.3, 1.7, 141)
        errors = [
            np.abs(np.asarray(enhance(image).enhance(f)) - one).mean() for f in tried
        ]
        assert min(errors) < 1
        factors.append(tried[np.argmin(errors)])
    assert 0.39 < min(factors) < 0.7 and 1.3 < max(factors) < 1.61


def test_hue_turns_colours_and_keeps_the_brightness():
    colours = np.zeros((64, 4, 4, 3), np.uint8) + np.array([150, 110, 90], np.uint8)
    found = np.asarray(random_jitter(colours, jax.random.key(0), hue=0.5)).astype(float)
    luma = found @ [0.299, 0.587, 0.114]
    assert np.abs(luma - np.array([150, 110, 90]) @ [0.299, 0.587, 0.114]).max() < 1.5
    strongest = found[:, 0, 0].argmax(-1)
    assert set(strongest) == {0, 1, 2}
    little = np.asarray(random_jitter(colours, jax.random.key(0), hue=0.02))
    assert 0 < np.abs(little.astype(int) - colours).max() < 15


def test_the_same_on_one_and_on_eight_devices():
    augment = jax.jit(
        make_augment(
            flip=0.5,
            cutout=0.5,
            jitter={"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1},
        )
    )
    images, labels = photos(16), np.zeros((16, 2), np.int8)
    alone, _ = augment(images, labels, jax.random.key(5))
    spread = jax.device_put((images, labels), batch_sharding(make_mesh(8, 1)))
    divided, _ = augment(*spread, jax.random.key(5))
    np.testing.assert_allclose(alone, divided, atol=1.01 / 127.5)
    assert np.mean(np.asarray(alone) != np.asarray(divided)) < 1e-3
    other, _ = augment(images, labels, jax.random.key(6))
    assert np.abs(np.asarray(alone) - other).mean() > 0.05
    none = make_augment(jitter={"brightness": 0.0}, cutout=0.0)
    plain, _ = none(images, labels, jax.random.key(5))
    np.testing.assert_array_equal(plain, normalise(images))


def test_evaluation_with_mirror_images():
    params, stats = make(features=PHOTO.size)

    def apply(params, stats, images, **options):
        return mlp(params, stats, images.reshape(len(images), -1), **options)

    images = np.stack([PHOTO, 255 - PHOTO])
    plain = step.make_eval_step(apply, normalise)
    both = step.make_eval_step(apply, normalise, flip=True)
    expected = plain(params, stats, images) + plain(params, stats, images[:, :, ::-1])
    found = both(params, stats, images)
    np.testing.assert_allclose(found, expected / 2, rtol=1e-5, atol=1e-6)
    mirrored = both(params, stats, jnp.asarray(images[:, :, ::-1]))
    np.testing.assert_allclose(found, mirrored, rtol=1e-5, atol=1e-6)
    assert np.abs(found - plain(params, stats, images)).max() > 1e-4
