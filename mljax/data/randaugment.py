"""RandAugment: a few operations on a picture, drawn from fifteen.

Each operation is what PIL does (nearest neighbour where pixels move), to the level of
rounding. It runs on the host, in the pipeline: there only the operations that were
drawn are computed, while a batch on the device would have all fifteen computed for
every picture. Each is one node of the graph, so that what was not drawn costs nothing.

References:
    Cubuk et al., "RandAugment" (2019), arXiv 1909.13719. Which operations, and how far
    each goes, is that of Prokofiev & Sovrasov, arXiv 2209.06585.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from mljax.data.decode import rare

DRAWS = 6  # random numbers that an operation takes
_FILL = 128  # where nothing of the picture comes to lie
_PATCH = (125, 122, 113)  # colour of the square that covers a part of the picture

# (image uint8 [height, width, 3], how far in [0, 1], sign -1 or 1, place [2] in [0, 1))
# -> image
Operation = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def randaugment(
    image: tf.Tensor, draws: tf.Tensor, *, n: int, m: int, prob: float
) -> tf.Tensor:
    """`n` operations in a row, drawn with replacement.

    Args:
        image: uint8 [height, width, 3].
        draws: float32 [n * DRAWS], random in [0, 1).
        m: magnitude 1 to 9; 0 = drawn for each operation.
        prob: that an operation which was drawn is done.
    """
    shape = image.shape
    for i in range(n):
        chosen, done, strength, sign, *place = tf.unstack(
            draws[i * DRAWS : (i + 1) * DRAWS], DRAWS
        )
        magnitude = tf.floor(strength * 9) + 1 if m == 0 else tf.constant(float(m))
        arguments = (
            image,
            magnitude / 9,
            tf.where(sign < 0.5, -1.0, 1.0),
            tf.stack(place),
        )
        branches = [lambda f=f, given=arguments: f(*given) for f in OPERATIONS.values()]
        number = tf.cast(chosen * len(branches), tf.int32)
        number = tf.where(done < prob, number, len(branches))
        image = tf.switch_case(number, [*branches, lambda given=image: given])
        image = tf.ensure_shape(image, shape)
    return image


@rare
def invert(image, share, sign, place):
    return 255 - image


@rare
def cutout(image, share, sign, place):
    """A square of 0 to 20 pixels anywhere; what lies outside is cut off."""
    side = tf.cast(20 * share, tf.int32)
    size = tf.shape(image)[:2]
    first = tf.cast(place * tf.cast(size, tf.float32), tf.int32) - side // 2
    (y, x), (y_end, x_end) = (
        tf.unstack(tf.clip_by_value(corner, 0, size), 2)
        for corner in (first, first + side)
    )
    patch = tf.broadcast_to(tf.constant(_PATCH, tf.uint8), [y_end - y, x_end - x, 3])
    middle = tf.concat([image[y:y_end, :x], patch, image[y:y_end, x_end:]], 1)
    return tf.concat([image[:y], middle, image[y_end:]], 0)


@rare
def sharpness(image, share, sign, place):
    return _enhance(_smooth(image), image, share, sign)


@rare
def contrast(image, share, sign, place):
    size = tf.shape(image)
    total = tf.reduce_sum(tf.cast(_grey(image), tf.int64))
    mean = tf.cast(total, tf.float64) / tf.cast(size[0] * size[1], tf.float64)
    return _enhance(tf.floor(mean + 0.5), image, share, sign)


@rare
def color(image, share, sign, place):
    grey = tf.repeat(tf.cast(_grey(image), tf.uint8), 3, -1)  # [height, 3 * width]
    return _enhance(tf.reshape(grey, tf.shape(image)), image, share, sign)


@rare
def brightness(image, share, sign, place):
    return _enhance(tf.zeros([]), image, share, sign)


@rare
def autocontrast(image, share, sign, place):
    """Stretches each channel to 0 to 255."""
    low = tf.cast(tf.reduce_min(image, (0, 1)), tf.float64)
    high = tf.cast(tf.reduce_max(image, (0, 1)), tf.float64)
    scale = 255 / tf.maximum(high - low, 1)
    levels = tf.range(256, dtype=tf.float64)[:, None]
    # As PIL writes it: the rounding decides where the product is a whole number.
    table = tf.clip_by_value(tf.floor(levels * scale - low * scale), 0, 255)
    return _look_up(image, tf.where(high > low, table, levels))


@rare
def posterize(image, share, sign, place):
    """Keeps the upper 8 to 4 bits."""
    lost = tf.cast(tf.round(4 * share), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, lost), lost)


@rare
def shear_x(image, share, sign, place):
    return _affine(image, [1, 0.3 * share * sign, 0, 0, 1, 0])


@rare
def shear_y(image, share, sign, place):
    return _affine(image, [1, 0, 0, 0.3 * share * sign, 1, 0])


@rare
def translate_x(image, share, sign, place):
    width = tf.cast(tf.shape(image)[1], tf.float32)
    return _affine(image, [1, 0, 150 / 331 * width * share * sign, 0, 1, 0])


@rare
def translate_y(image, share, sign, place):
    height = tf.cast(tf.shape(image)[0], tf.float32)
    return _affine(image, [1, 0, 0, 0, 1, 150 / 331 * height * share * sign])


@rare
def rotate(image, share, sign, place):
    """Up to 30 degrees around the middle, counter-clockwise where `sign` is 1."""
    angle = math.radians(30) * tf.cast(share * sign, tf.float64)
    cos, sin = tf.cos(angle), tf.sin(angle)
    size = tf.cast(tf.shape(image)[:2], tf.float64)
    y, x = size[0] / 2, size[1] / 2
    # The middle stays where it is.
    return _affine(
        image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
    )


@rare
def equalize(image, share, sign, place):
    """Spreads the values of each channel so that all are about equally frequent."""
    counts = tf.math.bincount(_places(image), minlength=768, maxlength=768)
    counts = tf.reshape(counts, [256, 3])
    levels = tf.range(256)[:, None]
    last = tf.reduce_max(tf.where(counts > 0, levels, 0), 0)
    of_last = tf.reduce_sum(tf.where(levels == last, counts, 0), 0)
    step = (tf.reduce_sum(counts, 0) - of_last) // 255
    below = tf.cumsum(counts, 0, exclusive=True)
    table = (step // 2 + below) // tf.maximum(step, 1)
    return _look_up(image, tf.where(step > 0, tf.minimum(table, 255), levels))


@rare
def solarize(image, share, sign, place):
    """Inverts what is above a threshold of 256 to 0."""
    threshold = tf.cast(tf.math.ceil(256 - 256 * share), tf.int16)
    above = tf.cast(image, tf.int16) >= threshold
    # Exclusive or with 255 inverts.
    return tf.bitwise.bitwise_xor(image, 255 * tf.cast(above, tf.uint8))


OPERATIONS: dict[str, Operation] = {
    "Invert": invert,
    "Cutout": cutout,
    "Sharpness": sharpness,
    "Contrast": contrast,
    "Color": color,
    "Brightness": brightness,
    "AutoContrast": autocontrast,
    "Posterize": posterize,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Equalize": equalize,
    "Solarize": solarize,
}


def _enhance(
    base: tf.Tensor, image: tf.Tensor, share: tf.Tensor, sign: tf.Tensor
) -> tf.Tensor:
    """`image` nearer to or farther from `base`: a factor of 0.1 to 1.9; cut off."""
    # Rounded to float32 once, as PIL does: 1 - 0.6 would be below 0.4.
    tenths = tf.cast(10 + tf.round(9 * share) * sign, tf.float64)
    factor = tf.cast(tenths / 10, tf.float32)
    base = tf.cast(base, tf.float32)
    mixed = base + factor * (tf.cast(image, tf.float32) - base)
    return tf.cast(tf.clip_by_value(mixed, 0, 255), tf.uint8)


def _grey(image: tf.Tensor) -> tf.Tensor:
    """Brightness int32 [height, width], in PIL's whole numbers."""
    red, green, blue = tf.unstack(tf.cast(image, tf.int32), 3, -1)
    total = 19595 * red + 38470 * green + 7471 * blue + 0x8000
    return tf.bitwise.right_shift(total, 16)


def _smooth(image: tf.Tensor) -> tf.Tensor:
    """The mean of 3 x 3 pixels, the middle one counted five times; borders stay."""
    values = tf.cast(image, tf.float32)
    rows = values[:-2] + values[1:-1] + values[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * values[1:-1, 1:-1]
    inner = tf.floor(total * (1 / 13) + 0.5)
    middle = tf.concat([values[1:-1, :1], inner, values[1:-1, -1:]], 1)
    return tf.concat([values[:1], middle, values[-1:]], 0)


def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """table [256, 3 or 1]: the new value of each value, by channel."""
    table = tf.broadcast_to(tf.cast(table, tf.uint8), [256, 3])
    values = tf.gather(tf.reshape(table, [-1]), _places(image))
    return tf.reshape(values, tf.shape(image))


def _places(image: tf.Tensor) -> tf.Tensor:
    """Where each value stands in a flat table [256, 3]: int32 [height, 3 * width].

    Whole rows at a time: with a last dimension of 3 this takes five times as long.
    """
    width = tf.shape(image)[1]
    rows = tf.reshape(tf.cast(image, tf.int32), [-1, 3 * width])
    return 3 * rows + tf.tile(tf.constant([0, 1, 2]), [width])


def _affine(image: tf.Tensor, matrix: list) -> tf.Tensor:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f), the nearest one.

    In whole numbers of 1 / 65536 pixel, as in PIL.
    """
    a, b, c, d, e, f = (tf.cast(value, tf.float64) for value in matrix)
    size = tf.shape(image)
    height, width = size[0], size[1]
    x, y = tf.range(width)[None], tf.range(height)[:, None]

    def source(along_x: tf.Tensor, along_y: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
        start = start + (along_x + along_y) / 2  # of the middle of the first pixel
        by_x, by_y, first = (
            tf.cast(tf.floor(value * 65536 + 0.5), tf.int32)
            for value in (along_x, along_y, start)
        )
        return tf.bitwise.right_shift(first + by_y * y + by_x * x, 16)

    from_x, from_y = source(a, b, c), source(d, e, f)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    # One pixel more, behind the last: the fill.
    pixels = tf.reshape(image, [-1, 3])
    pixels = tf.concat([pixels, tf.fill([1, 3], tf.constant(_FILL, tf.uint8))], 0)
    return tf.gather(pixels, tf.where(inside, from_y * width + from_x, height * width))
