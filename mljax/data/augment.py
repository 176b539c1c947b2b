"""What happens to a batch on the device, inside the step.

Random numbers come from the key that a function is given, never from the layout of
the devices: one device and eight give the same batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normalise(images: jax.Array) -> jax.Array:
    """uint8 `[batch, height, width, 3]` to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def random_flip(images: jax.Array, rng: jax.Array, probability: float) -> jax.Array:
    """Mirrors each image of `[batch, height, width, 3]` left to right by chance."""
    chosen = jax.random.bernoulli(rng, probability, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def random_cutout(
    images: jax.Array, rng: jax.Array, probability: float, side: float
) -> jax.Array:
    """Covers a part of an image with one random colour, each by chance.

    The part is `side` of the height by `side` of the width around a point anywhere in
    the image; what lies outside is cut off.

    Args:
        images: uint8 `[batch, height, width, 3]`.
        probability: for each image.
        side: share of the image's sides, in [0, 1].

    References:
        DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks
        with Cutout" (2017), arXiv 1708.04552.
    """
    chosen_key, colour_key, *keys = jax.random.split(rng, 4)
    count, sides = len(images), images.shape[1:3]
    inside = []
    for length, key in zip(sides, keys, strict=True):
        covered = jnp.round(side * length).astype(jnp.int32)
        first = jax.random.randint(key, (count, 1), 0, length) - covered // 2
        pixels = jnp.arange(length)
        inside.append((pixels >= first) & (pixels < first + covered))
    box = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    box &= jax.random.bernoulli(chosen_key, probability, (count, 1, 1, 1))
    colour = jax.random.randint(colour_key, (count, 1, 1, 3), 0, 256).astype(jnp.uint8)
    return jnp.where(box, colour, images)


def random_jitter(
    images: jax.Array,
    rng: jax.Array,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> jax.Array:
    """Changes the colours of each image of uint8 `[batch, height, width, 3]`.

    In this order: the values times a factor; their distance from the image's mean
    brightness times a factor; their distance from the pixel's brightness times a
    factor; the colours turned around the grey axis.

    Args:
        brightness, contrast, saturation: x draws the factor from 1 - x to 1 + x.
        hue: largest turn, as a share of the full circle.
    """
    keys = jax.random.split(rng, 4)
    values = images.astype(jnp.float32)

    def drawn(key: jax.Array, largest: float) -> jax.Array:
        shape = (len(images), 1, 1, 1)
        return jax.random.uniform(key, shape, minval=-largest, maxval=largest)

    def away_from(base: jax.Array, key: jax.Array, largest: float) -> jax.Array:
        mixed = base + (1 + drawn(key, largest)) * (values - base)
        return jnp.clip(mixed, 0, 255)

    if brightness:
        values = away_from(jnp.zeros(()), keys[0], brightness)
    luma = jnp.array(_LUMA)
    if contrast:
        grey = jnp.mean(values @ luma, (1, 2), keepdims=True)[..., None]
        values = away_from(grey, keys[1], contrast)
    if saturation:
        values = away_from((values @ luma)[..., None], keys[2], saturation)
    if hue:
        # In YIQ a hue is an angle: turn I and Q, keep the brightness Y.
        turn = 2 * jnp.pi * drawn(keys[3], hue)[..., 0]
        cos, sin = jnp.cos(turn), jnp.sin(turn)
        y, i, q = (_mixed(values, row) for row in _YIQ)
        yiq = jnp.stack([y, i * cos - q * sin, i * sin + q * cos], -1)
        rgb = jnp.stack([_mixed(yiq, row) for row in np.linalg.inv(_YIQ)], -1)
        values = jnp.clip(rgb, 0, 255)
    return jnp.round(values).astype(jnp.uint8)


_LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


def _mixed(values: jax.Array, weights: Any) -> jax.Array:
    """The weighted sum of the channels: [..., 3] -> [...].

    Written out: a product with a matrix of 3 by 3 takes ten times as long on a CPU.
    """
    red, green, blue = (float(weight) for weight in weights)
    return red * values[..., 0] + green * values[..., 1] + blue * values[..., 2]


def make_augment(
    *,
    flip: float = 0.0,
    cutout: float = 0.0,
    cutout_side: float = 0.4,
    jitter: Mapping[str, float] | None = None,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    mixup_prob: float = 1.0,
    mixup_switch_prob: float = 0.5,
) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The augmentation of training batches on the device, in the order of:

    Args:
        jitter: the arguments of `random_jitter`; None = none.
        cutout: probability of `random_cutout`, drawn for each image.
        cutout_side: share of the sides that it covers.
        flip: probability of a horizontal flip, drawn for each image.
        mixup_alpha: mixup with lam ~ Beta(mixup_alpha, mixup_alpha); 0 = none.
        cutmix_alpha: the same for cutmix.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: where both are on, the probability of cutmix.

    Returns:
        augment(images, labels, rng) -> (images, labels) of a batch: images uint8
        [batch, height, width, 3] -> float32 in [-1, 1]; labels [batch, num_classes]
        as they are, or float32 where batches are mixed.

    One lam is drawn a batch, and each image is mixed with the one before it in the
    whole batch (the first with the last): as good as a permutation, since batches are
    drawn in random order. Over several devices this moves one uint8 image to a
    neighbour, where a permutation or the reversed batch would move all of them.
    Where that one has no known label at all, as an image that could not be read, the
    image stays as it is.
    """

    def augment(
        images: jax.Array, labels: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if jitter and any(jitter.values()):
            images = random_jitter(images, jax.random.fold_in(rng, 3), **jitter)
        if cutout > 0:
            key = jax.random.fold_in(rng, 2)
            images = random_cutout(images, key, cutout, cutout_side)
        if flip > 0:
            images = random_flip(images, rng, flip)
        if not (mixup_alpha or cutmix_alpha):
            return normalise(images), labels
        share, lam = _draw_mix(
            jax.random.fold_in(rng, 1),
            images.shape[1],
            images.shape[2],
            mixup_alpha,
            cutmix_alpha,
            mixup_prob,
            mixup_switch_prob,
        )
        images, others = normalise(images), normalise(jnp.roll(images, 1, axis=0))
        other_labels = jnp.roll(labels, 1, axis=0)
        known = jnp.any(other_labels >= 0, axis=1, keepdims=True)
        mixed = share * images + (1 - share) * others
        images = jnp.where(known[:, :, None, None], mixed, images)
        mixed_labels = mix_labels(labels, other_labels, lam)
        return images, jnp.where(known, mixed_labels, labels.astype(jnp.float32))

    return augment


def mix_labels(labels: jax.Array, others: jax.Array, lam: jax.Array) -> jax.Array:
    """Targets of mixed images: clip(lam labels + (1 - lam) others, 0, 1), float32.

    An entry that is not annotated (-1) in one of the two images is -1: what the mix
    shows there is unknown. Only what an image of share 0 says does not count.

    Args:
        labels, others: [batch, num_classes]; 1, 0, -1 or soft in [0, 1].
        lam: share of `labels`, a scalar in [0, 1].
    """
    labels, others = labels.astype(jnp.float32), others.astype(jnp.float32)
    unknown = ((labels < 0) & (lam > 0)) | ((others < 0) & (lam < 1))
    mixed = jnp.clip(lam * labels + (1 - lam) * others, 0, 1)
    return jnp.where(unknown, -1, mixed)


def random_box(
    rng: jax.Array, height: int, width: int, lam: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cutmix's box: its sides are sqrt(1 - lam) of the image's, its centre is anywhere.

    What lies outside the image is cut off, so that lam is corrected.

    Args:
        height, width: of the image, in pixels.
        lam: share of the image that is to stay, a scalar in [0, 1].

    Returns:
        (float32 [1, height, width, 1], 0 inside the box and 1 outside; the share of
        the image that is outside).
    """
    inside: list[jax.Array] = []
    for side, key in zip((height, width), jax.random.split(rng), strict=True):
        length = (side * jnp.sqrt(1 - lam)).astype(jnp.int32)
        first = jax.random.randint(key, (), 0, side) - length // 2
        pixels = jnp.arange(side)
        inside.append((pixels >= first) & (pixels < first + length))
    box = inside[0][:, None] & inside[1][None, :]
    outside = 1 - box.astype(jnp.float32)
    area = jnp.sum(box, dtype=jnp.float32) / (height * width)
    return outside[None, :, :, None], 1 - area


def _draw_mix(
    rng: jax.Array,
    height: int,
    width: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
) -> tuple[jax.Array, jax.Array]:
    """(share of an image in each pixel of its mix, broadcastable; lam, its mean).

    References:
        Zhang et al., "mixup" (2018), arXiv 1710.09412. Yun et al., "CutMix" (2019),
        arXiv 1905.04899, algorithm A1. Batches are mixed as in timm's "batch" mode.
    """
    mixed_key, switch_key, lam_key, box_key = jax.random.split(rng, 4)
    if not (mixup_alpha and cutmix_alpha):
        switch_prob = 1.0 if cutmix_alpha else 0.0
    cut = jax.random.bernoulli(switch_key, switch_prob)
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
    lam = jax.random.beta(lam_key, alpha, alpha, dtype=jnp.float32)
    # A share of 1 everywhere leaves the batch as it is, to the bit.
    lam = jnp.where(jax.random.bernoulli(mixed_key, prob), lam, 1.0)
    outside, corrected = random_box(box_key, height, width, lam)
    return jnp.where(cut, outside, lam), jnp.where(cut, corrected, lam)
