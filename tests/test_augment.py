"""Mixup and cutmix of multi-label batches, on any number of devices."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import bce, make, mlp

from configs.common import get_config
from mljax.data.augment import make_augment, mix_labels, normalise, random_box
from mljax.optim import make_optimizer
from mljax.sharding import batch_sharding, make_mesh
from mljax.step import create_state, make_train_step

SIDE = 8
MIXUP, CUTMIX = {"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}
BOTH = MIXUP | CUTMIX


def make_batch(count=16, classes=4, seed=0):
    """uint8 images and int8 labels, a few of them -1."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = draw.choice([0, 1, 1, 0, -1], (count, classes)).astype(np.int8)
    return images, labels


def mix(seed=0, images=None, labels=None, **options):
    given = make_batch()
    images = given[0] if images is None else images
    labels = given[1] if labels is None else labels
    augment = compiled(**options)
    return [np.asarray(x) for x in augment(images, labels, jax.random.key(seed))]


@lru_cache
def compiled(**options):
    return jax.jit(make_augment(**options))


def shares_of(seed, **options):
    """The share of every image in its own mix, by pixel [SIDE, SIDE]."""
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    images[0] = 255
    mixed, _ = mix(seed, images, np.zeros((2, 1), np.int8), **options)
    shares = (mixed[..., 0] + 1) / 2
    # The second image is black: what it has is the share of the other.
    np.testing.assert_allclose(shares[0] + shares[1], 1, atol=1e-6)
    return shares[0]


def test_without_mixing_labels_stay_as_they_are():
    images, labels = make_batch()
    mixed, targets = mix()
    assert targets.dtype == np.int8 and np.array_equal(targets, labels)
    np.testing.assert_array_equal(mixed, jax.jit(normalise)(images))
    flipped, targets = mix(flip=1.0)
    np.testing.assert_array_equal(flipped, jax.jit(normalise)(images[:, :, ::-1]))


@pytest.mark.parametrize("options", [MIXUP, CUTMIX, BOTH])
def test_a_batch_that_is_not_chosen_stays_as_it_is_to_the_bit(options):
    images, labels = make_batch()
    mixed, targets = mix(mixup_prob=0.0, **options)
    np.testing.assert_array_equal(mixed, jax.jit(normalise)(images))
    np.testing.assert_array_equal(targets, labels)
    assert targets.dtype == np.float32


def test_mixup_is_a_weighted_mean_of_an_image_and_the_one_before_it():
    images, labels = make_batch()
    labels = np.abs(labels)
    for seed in range(5):
        share = shares_of(seed, **MIXUP)
        assert share.max() - share.min() < 1e-6
        lam = share.mean()
        assert 0 < lam < 1
        mixed, targets = mix(seed, images, labels, **MIXUP)
        for found, given in ((mixed, normalise(images)), (targets, labels)):
            expected = lam * given + (1 - lam) * np.roll(given, 1, axis=0)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        # Every image has as much weight in the batch as before.
        np.testing.assert_allclose(targets.sum(0), labels.sum(0), rtol=1e-5)


def test_cutmix_pastes_one_box_and_lam_is_its_real_area():
    images, labels = make_batch()
    labels = np.abs(labels)
    areas = []
    for seed in range(20):
        share = shares_of(seed, **CUTMIX)
        inside = share < 0.5
        np.testing.assert_allclose(share, np.where(inside, 0, 1), atol=1e-6)
        rows, columns = inside.any(1), inside.any(0)
        np.testing.assert_array_equal(inside, rows[:, None] & columns)
        for line in (rows, columns):  # without a gap
            assert (np.diff(line.astype(int)) != 0).sum() <= 2
        areas.append(inside.mean())
        mixed, targets = mix(seed, images, labels, **CUTMIX)
        pasted = np.where(inside[None, :, :, None], np.roll(images, 1, 0), images)
        np.testing.assert_allclose(mixed, normalise(jnp.asarray(pasted)), atol=1e-6)
        lam = 1 - inside.mean()
        expected = lam * labels + (1 - lam) * np.roll(labels, 1, axis=0)
        np.testing.assert_allclose(targets, expected, atol=1e-6)
    assert 0.1 < np.mean(areas) < 0.6 and np.std(areas) > 0.1


def test_the_box_has_the_area_that_was_asked_for_unless_it_is_cut_off():
    find = jax.jit(lambda rng, lam: random_box(rng, 100, 50, lam))
    sums = []
    for seed in range(50):
        outside, lam = find(jax.random.key(seed), jnp.float32(0.36))
        assert outside.shape == (1, 100, 50, 1)
        np.testing.assert_allclose(lam, np.mean(outside), rtol=1e-6)
        assert lam >= 0.36 - 1e-6
        sums.append(np.sum(1 - outside))
    assert max(sums) == 80 * 40 and min(sums) < 0.6 * 80 * 40
    outside, lam = find(jax.random.key(0), jnp.float32(1.0))
    assert lam == 1 and np.all(outside == 1)


def test_what_one_image_does_not_know_the_mix_does_not_know():
    own = jnp.asarray([[1, 1, 1, 0, 0, -1, -1, -1, 0.5]])
    other = jnp.asarray([[1, 0, -1, 1, -1, -1, 1, 0, 1.0]])
    expected = [[1, 0.75, -1, 0.25, -1, -1, -1, -1, 0.625]]
    np.testing.assert_allclose(mix_labels(own, other, 0.75), expected, rtol=1e-6)
    # An image of which nothing is seen has no say.
    np.testing.assert_array_equal(mix_labels(own, other, 1.0), own)
    np.testing.assert_array_equal(mix_labels(own, other, 0.0), other)
    images, labels = make_batch()
    for options in (MIXUP, CUTMIX):
        _, targets = mix(3, images, labels, **options)
        unknown = (labels < 0) | (np.roll(labels, 1, 0) < 0)
        np.testing.assert_array_equal(targets == -1, unknown)
        assert ((targets[~unknown] >= 0) & (targets[~unknown] <= 1)).all()


def test_an_image_is_not_mixed_with_one_of_which_nothing_is_known():
    images, labels = make_batch()
    labels[labels < 0] = 0
    images[1], labels[1] = 0, -1  # as one that could not be read
    for options in (MIXUP, CUTMIX):
        mixed, targets = mix(3, images, labels, **options)
        own = np.asarray(jax.jit(normalise)(images))
        np.testing.assert_array_equal(mixed[2], own[2])
        np.testing.assert_array_equal(targets[2], labels[2])
        assert not np.array_equal(mixed[3], own[3])
        np.testing.assert_array_equal(targets[1], -1)


def test_alpha_prob_and_switch_prob_do_what_they_say():
    def kinds(seeds, **options):
        found = []
        for seed in range(seeds):
            share = shares_of(seed, **options)
            flat = share.max() - share.min() < 1e-6
            found.append("none" if share.min() > 1 - 1e-6 else "mix" if flat else "cut")
        return found

    # An eighth of the boxes is smaller than a pixel here, and so is none.
    both = kinds(60, **BOTH)
    assert 15 < both.count("mix") < 45 and both.count("cut") > 10
    assert "mix" not in kinds(20, mixup_switch_prob=1.0, mixup_prob=0.9, **BOTH)
    half = kinds(60, mixup_switch_prob=0.0, mixup_prob=0.5, **BOTH)
    assert 15 < half.count("none") < 45 and "mix" in half and "cut" not in half
    # Beta(1, 1) is uniform: 1/4 from the middle on average; Beta(50, 50) is not.
    for alpha, low, high in ((1.0, 0.15, 0.35), (50.0, 0.01, 0.1)):
        shares = [shares_of(i, mixup_alpha=alpha).mean() for i in range(30)]
        assert low < np.mean(np.abs(np.subtract(shares, 0.5))) < high


def image_mlp(params, stats, images, **options):
    return mlp(params, stats, images.reshape(len(images), -1), **options)


def ignoring_bce(outputs, labels):
    known = labels >= 0
    return bce(jnp.where(known, outputs, -1e9), jnp.where(known, labels, 0))


def train(mesh=None, steps=3):
    """The losses and the parameters of a few steps on mixed batches."""
    params, stats = make(features=SIDE * SIDE * 3)
    config = get_config().optim
    config.update(lr=0.02, schedule="constant")
    optimizer = make_optimizer(config, 16, 30, params)
    step = make_train_step(
        image_mlp,
        ignoring_bce,
        optimizer,
        make_augment(flip=0.5, **BOTH),
        reduction="sum",
        seed=1,
    )
    state = create_state(params, stats, optimizer, use_ema=False)
    step = jax.jit(step)
    losses = []
    for i in range(steps):
        images, labels = make_batch(seed=i)
        batch = {"image": images, "labels": labels}
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def close(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found[1], expected[1]
    )


def test_mixed_steps_are_the_same_on_one_and_on_eight_devices():
    alone = train()
    assert np.isfinite(alone[0]).all()
    close(train(make_mesh(4, 2)), alone)


def test_the_whole_batch_is_mixed_before_it_is_divided():
    """Parts of an accumulated batch see the images that the whole batch would."""
    seen = []
    images, labels = make_batch()

    def halves(images, labels, rng):
        return normalise(images) + normalise(jnp.roll(images, 1, axis=0)), labels

    def record(params, stats, images, **_):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images, ordered=True)
        return images.mean((1, 2, 3))[:, None] * params["w"], stats

    params = {"w": jnp.ones((1, 4))}
    config = get_config().optim
    optimizer = make_optimizer(config, 16, 30, params)
    for accumulate in (1, 4):
        step = make_train_step(
            record,
            ignoring_bce,
            optimizer,
            halves,
            reduction="sum",
            seed=0,
            accumulate=accumulate,
        )
        state = create_state(params, {}, optimizer, use_ema=False)
        batch = {"image": images, "labels": labels}
        jax.block_until_ready(jax.jit(step)(state, batch))
        jax.effects_barrier()
    assert [len(x) for x in seen] == [16, 4, 4, 4, 4]
    for part, found in enumerate(seen[1:]):
        np.testing.assert_allclose(found, seen[0][part::4], atol=1e-6)


def test_mixing_moves_one_image_between_neighbours():
    mesh = make_mesh(8, 1)
    rows = batch_sharding(mesh)
    images, labels = jax.device_put(make_batch(count=64), rows)
    augment = jax.jit(make_augment(**BOTH), out_shardings=rows)
    text = augment.lower(images, labels, jax.random.key(0)).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text
    assert f"u8[1,{SIDE},{SIDE},3]" in text
