"""From a picture of any size to the size of the batch: crop, resize, grey bars.

`mljax.images` does the same without TensorFlow, for prediction, and `device_resize` the
last part of it on the device.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mljax.data.decode import decode
from mljax.data.decode_part import REDUCTIONS, cut, decode_part
from mljax.data.source import Source
from mljax.images import GREY, sides_of

NUM_DRAWS = 6  # random numbers that a picture takes in training

# (index int64 scalar, the bytes of its file where the source has files, draws float32
# [at least NUM_DRAWS]) -> uint8 [height, width, 3] of the target's size; in training
# with `resize_on_device` of any size that fits on the canvas
Prepare = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def make_prepare(source: Source, data_config: ConfigDict, train: bool) -> Prepare:
    """Decodes an image and brings it to `data_config.image_size`.

    In training with `resize_on_device` only so far that it fits into the canvas.

    Args:
        train: crop at random, as `data_config` says, by draws of `shape_crops`.
    """
    target = sides_of(data_config)
    cropped = train and data_config.crop_area < 1
    boxed = cropped or data_config.fit == "crop"
    partial = boxed or data_config.scaled_decode > 0
    canvas = data_config.resize_on_device if train else 0

    def prepare(index: tf.Tensor, data: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        def choose(size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            box = tf.concat([tf.zeros_like(size), size], 0)
            if cropped:
                box = _random_box(size, draws[:4])
            if data_config.fit == "crop":
                box = _shaped_box(box, target, draws[4:6] if train else None)
            return box, _level(box[2:], target, data_config)

        if source.encoded is None:
            image = source.read(index)
            image = cut(image, choose) if boxed else image
        elif partial:
            image = decode_part(data, data_config.max_pixels, choose)
        else:
            image = decode(data, data_config.max_pixels)
        if canvas:
            return _within(image, canvas, data_config)
        return _fitted(image, target, data_config)

    return prepare


def shape_crops(draws: np.ndarray, data_config: ConfigDict) -> np.ndarray:
    """Turns the first two random numbers of each row into the sides of a crop.

    Its area is uniform in [crop_area, 1] of the picture's, the logarithm of its shape
    uniform around that of the target. Done here for a whole step, as each small
    operation costs a little for every picture inside TensorFlow.

    Args:
        draws: float32 [batch, at least NUM_DRAWS], uniform in [0, 1).

    Returns:
        The same, with height and width as multiples of the square root of the
        picture's area in the first two columns.

    References:
        Szegedy et al., "Going deeper with convolutions" (2014), section 6.
    """
    height, width = sides_of(data_config)
    smallest, log_ratio = data_config.crop_area, math.log(data_config.crop_ratio)
    area = smallest + (1 - smallest) * draws[:, 0]
    shape = np.exp((2 * draws[:, 1] - 1) * log_ratio) * (width / height)
    sides = np.sqrt(np.stack([area / shape, area * shape], 1)).astype(np.float32)
    return np.concatenate([sides, draws[:, 2:]], 1)


def _random_box(size: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """The crop of `shape_crops` in a picture of `size`, anywhere in it.

    A side that would be longer than the picture's is cut to it.
    """
    exact = tf.sqrt(tf.reduce_prod(tf.cast(size, tf.float32))) * draws[:2]
    sides = tf.clip_by_value(tf.cast(tf.round(exact), tf.int32), 1, size)
    return tf.concat([_place(size - sides, draws[2:4]), sides], 0)


def _place(room: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """0 to `room`, by random numbers in [0, 1)."""
    place = tf.cast(draws * tf.cast(room + 1, tf.float32), tf.int32)
    return tf.minimum(place, room)  # float32 rounds


def _shaped_box(
    box: tf.Tensor, target: tuple[int, int], draws: tf.Tensor | None
) -> tf.Tensor:
    """The largest box of the target's shape inside `box`, anywhere or in the middle."""
    first, sides = box[:2], box[2:]
    shape = tf.constant(target)
    longest = (sides[::-1] * shape + shape[::-1] // 2) // shape[::-1]
    room = sides - tf.clip_by_value(longest, 1, sides)
    first += room // 2 if draws is None else _place(room, draws)
    return tf.concat([first, sides - room], 0)


def _level(
    sides: tf.Tensor, target: tuple[int, int], data_config: ConfigDict
) -> tf.Tensor:
    """Which of REDUCTIONS still leaves `scaled_decode` times what is needed."""
    if not data_config.scaled_decode:
        return tf.constant(0)
    # Whole numbers, as in mljax.images: no rounding can make the two differ.
    enough = round(100 * data_config.scaled_decode)
    needed = [[enough * side * by for side in target] for by in REDUCTIONS[1:]]
    # With bars the side that fills the target decides, which is the longer one.
    both = tf.reduce_any if data_config.fit == "letterbox" else tf.reduce_all
    fits = both(100 * sides >= tf.constant(needed), 1)
    return tf.reduce_sum(tf.cast(fits, tf.int32))


def _fitted(
    image: tf.Tensor, target: tuple[int, int], data_config: ConfigDict
) -> tf.Tensor:
    """`image` resized to the target, or into it with bars where the aspect is kept."""
    goal = tf.constant(target)
    if data_config.fit == "letterbox":
        goal = _inside(tf.shape(image)[:2], goal)
    image = _resized(image, goal, data_config)
    if data_config.fit == "letterbox":
        bars = tf.constant(target) - goal
        before = bars // 2
        padding = tf.stack([before, bars - before], 1)
        padding = tf.concat([padding, [[0, 0]]], 0)
        image = tf.pad(image, padding, constant_values=tf.constant(GREY, tf.uint8))
    return tf.ensure_shape(image, [*target, 3])


def _within(image: tf.Tensor, longest: int, data_config: ConfigDict) -> tf.Tensor:
    """`image` as it is, or made smaller so that no side is longer than that."""
    size = tf.shape(image)[:2]
    goal = tf.minimum(size, longest)
    if data_config.fit == "letterbox":  # which the device does by the aspect it has
        square = tf.constant([longest, longest])
        goal = tf.where(tf.reduce_all(size <= longest), size, _inside(size, square))
    return _resized(image, goal, data_config)


def _inside(size: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """(height, width) of a picture made to fit into `target`, its aspect kept."""
    other = size[::-1]
    kept = (size * target[::-1] + other // 2) // other
    return tf.clip_by_value(kept, 1, target)


def _resized(image: tf.Tensor, goal: tf.Tensor, data_config: ConfigDict) -> tf.Tensor:
    """uint8 [*goal, 3], by the method of `data_config`."""
    size = tf.shape(image)[:2]

    def plain(method: str = "bilinear") -> tf.Tensor:
        # From float32 these kernels are twice as fast as from uint8; the one that
        # antialiases is a little slower.
        return tf.image.resize(tf.cast(image, tf.float32), goal, method)

    def resize() -> tf.Tensor:
        if data_config.resize == "area":
            resized = plain("area")
        elif data_config.antialias:
            # Where no side shrinks there is nothing to average, and the plain kernel
            # gives the same in a quarter of the time.
            resized = tf.cond(
                tf.reduce_all(goal >= size),
                plain,
                lambda: tf.image.resize(image, goal, antialias=True),
            )
        else:
            resized = plain()
        # Means of values of 0 to 255: nothing is to be cut off, which would cost as
        # much as decoding a small picture.
        return tf.cast(tf.round(resized), tf.uint8)

    return tf.cond(tf.reduce_all(size == goal), lambda: image, resize)
