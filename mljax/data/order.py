"""Which images a step sees, and its random numbers: functions of (seed, step)."""

import numpy as np

# Set these uses of the seed apart from each other and from `permutation`.
_CLASSES = 0x636C_6173 << 32
_DRAWS = 0x6472_6177 << 32


def permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in an epoch, int64 [num_images]."""
    return _generator(seed, epoch).permutation(num_images)


def class_aware(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch in which every label comes up equally often, int64 [num_images].

    The labels take turns in random order, and each turn gives one of the label's
    images; a label's images come once each before one comes again. Images without any
    label take part as if this were one more label. An image with several labels comes
    up for each of them.

    Args:
        labels: [num_images, num_classes]; 1 is positive, anything else is not.

    References:
        Shen, Lin, Huang: "Relay Backpropagation for Effective Learning of Deep
        Convolutional Neural Networks" (2016), section 5.2, arXiv 1512.05830.
    """
    rng = _generator(seed + _CLASSES, epoch)
    positive = labels == 1
    members = [np.flatnonzero(column) for column in positive.T]
    members.append(np.flatnonzero(~positive.any(1)))
    members = [images for images in members if len(images)]
    rounds = -(-len(labels) // len(members))
    turns = np.concatenate([rng.permutation(len(members)) for _ in range(rounds)])
    turns = turns[: len(labels)]
    order = np.empty(len(labels), np.int64)
    for label, images in enumerate(members):
        places = np.flatnonzero(turns == label)
        repeats = -(-len(places) // len(images))
        drawn = [rng.permutation(images) for _ in range(repeats)]
        if drawn:
            order[places] = np.concatenate(drawn)[: len(places)]
    return order


def draws(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """`count` random numbers for each row of a global batch, float32 in [0, 1)."""
    rng = _generator(seed + _DRAWS, step)
    return rng.random((batch_size, count), np.float32)


def _generator(seed: int, index: int) -> np.random.Generator:
    key = np.array([seed % 2**64, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
