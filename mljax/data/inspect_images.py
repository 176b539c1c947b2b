"""What the images of a source are like: each is read and decoded once, by threads."""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from mljax.data.decode import decode, reason
from mljax.data.pipeline import num_cpus
from mljax.data.source import Source

TINY = 32  # pixels of the shorter side
HUGE = 16_000_000  # pixels: they take long to decode
_LONG = 4.0  # longer side over the shorter one

_FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg"), ("JPEG", "MPO")),
    **{".png": ("PNG",), ".bmp": ("BMP",), ".gif": ("GIF",), ".webp": ("WEBP",)},
}
_MODES = {"CMYK": "in CMYK", "L": "in grey", "1": "in grey", "LA": "in grey"}
_MODES |= {"P": "with a palette", "PA": "with a palette"}
_HAVE_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class ImageFacts(NamedTuple):
    """What is known of one image.

    Attributes:
        key: hash of its bytes (of its pixels where there is no file); None where they
            cannot be read.
        height, width: pixels, EXIF rotation applied; 0 where unreadable.
        reason: why training cannot read it; "" where it can.
        traits: what is unusual about it, each a short text.
    """

    key: bytes | None
    height: int
    width: int
    reason: str
    traits: tuple[str, ...]


def scan(
    source: Source, max_pixels: int, progress: Callable[[int], None]
) -> list[ImageFacts]:
    """Facts of every image, in the order of the source.

    Args:
        source: the images.
        max_pixels: a larger image is unreadable, as in training.
        progress: told after each image how many are done.
    """

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([], tf.string)])
    def size_of(data: tf.Tensor) -> tf.Tensor:
        return tf.shape(decode(data, max_pixels))

    def facts(index: int) -> ImageFacts:
        row = tf.constant(index, tf.int64)
        try:
            if source.encoded is None:
                pixels = source.read(row).numpy()
                key = hashlib.sha256(pixels.tobytes()).digest()
                height, width, _ = pixels.shape
                return ImageFacts(key, height, width, "", _long(height, width))
            data = source.encoded(row).numpy()
        except tf.errors.OpError as error:
            return ImageFacts(None, 0, 0, reason(error), ())
        key = hashlib.sha256(data).digest()
        traits = tuple(_traits(data, source.names[index]))
        try:
            height, width, _ = size_of(tf.constant(data)).numpy().tolist()
        except tf.errors.OpError as error:
            return ImageFacts(key, 0, 0, reason(error), traits)
        return ImageFacts(key, height, width, "", traits + _long(height, width))

    found = []
    with ThreadPoolExecutor(num_cpus()) as pool:
        for one in pool.map(facts, range(len(source))):
            found.append(one)
            progress(len(found))
    return found


def thumbnail(source: Source, index: int, side: int) -> np.ndarray:
    """The picture, no side longer than `side` pixels: uint8 [height, width, 3]."""
    image = Image.fromarray(source.read(tf.constant(index, tf.int64)).numpy())
    image.thumbnail((side, side))
    return np.asarray(image)


def _long(height: int, width: int) -> tuple[str, ...]:
    ratio = max(height, width) / max(1, min(height, width))
    return (f"longer than {_LONG:g} to 1",) if ratio > _LONG else ()


def _traits(data: bytes, name: str) -> list[str]:
    """From the header alone; nothing where it makes no sense."""
    found = []
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, info = image.format, image.mode, image.info
            is_jpeg = kind in ("JPEG", "MPO")
            # An animated WebP file is unreadable, and named as such.
            is_animated = kind == "GIF" and getattr(image, "is_animated", False)
            has_exif = is_jpeg or kind in ("PNG", "WEBP")
            turned = image.getexif().get(0x0112, 1) if has_exif else 1
    except Exception:  # PIL raises anything for damaged files
        return []
    ending = os.path.splitext(name)[1].lower()
    if ending in _FORMATS and kind not in _FORMATS[ending]:
        found.append(f"named {ending}, but {kind}")
    if mode in _MODES:
        found.append(_MODES[mode])
    # PIL makes 8 bits of 16-bit colours; the header of a PNG tells.
    if mode.startswith("I") or (kind == "PNG" and data[24:25] == b"\x10"):
        found.append("with 16 bits a channel")
    if mode in _HAVE_ALPHA or "transparency" in info:
        found.append("with transparency (it is dropped)")
    if isinstance(turned, int) and 2 <= turned <= 8:
        found.append("turned by EXIF")
    if is_animated:
        found.append("animated (its first picture counts)")
    if info.get("progressive"):
        found.append("progressive")
    return found
