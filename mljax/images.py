"""Image files and arrays -> uint8 pixels of one size, without TensorFlow.

The same pixels as in training (`data.decode`, `data.pipeline`), up to rounding.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class UnreadableImage(ValueError):
    """Why an image could not be read, on one line and without its name."""


def read(image: Any, max_pixels: int) -> np.ndarray:
    """RGB pixels of a file or a picture.

    EXIF rotation is applied to JPEGs, alpha is dropped, 16-bit values keep their upper
    8 bits, of an animation the first frame is taken.

    Args:
        image: a path, a PIL image, or an array: uint8 [height, width, 3] or
            [height, width].
        max_pixels: of height * width; a larger picture is not decoded.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UnreadableImage: damaged, too large, of another format, or no such file.
    """
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as opened:
                return _pixels(opened, max_pixels)
        except UnreadableImage:
            raise
        except FileNotFoundError:
            raise UnreadableImage("no such file") from None
        except Image.UnidentifiedImageError:
            raise UnreadableImage("not an image of a known format") from None
        # PIL raises these and SyntaxError, struct.error, ... for damaged files.
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error)
            text = " ".join(reason.split())[:200]
            raise UnreadableImage(text or type(error).__name__) from None
    if isinstance(image, Image.Image):
        return _pixels(image, max_pixels)
    array = np.asarray(image)
    if array.dtype == np.uint8 and array.ndim == 2 and array.size:
        array = np.repeat(array[:, :, None], 3, 2)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UnreadableImage(
            f"an array must be uint8 [height, width, 3], not {array.dtype} "
            f"{list(array.shape)}"
        )
    if not array.size:
        raise UnreadableImage("an array without pixels")
    return array


def _pixels(image: Image.Image, max_pixels: int) -> np.ndarray:
    if image.width * image.height > max_pixels:
        raise UnreadableImage(
            f"{image.height} x {image.width} pixels, more than data.max_pixels = "
            f"{max_pixels}"
        )
    if image.format in ("JPEG", "MPO"):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, 2)
    return np.asarray(image.convert("RGB"))


def resize(image: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """Bilinear to a square, as tf.image.resize: [h, w, 3] -> uint8 [size, size, 3]."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    rows, columns = _weights(height, size, antialias), _weights(width, size, antialias)
    pixels = image.reshape(height, -1).astype(np.float32)
    resized = np.matmul(columns, (rows @ pixels).reshape(size, width, 3))
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _weights(length: int, size: int, antialias: bool) -> np.ndarray:
    """float32 [size, length]: a triangle around each new pixel's place, rows sum to 1.

    Where the picture becomes smaller, antialiasing makes the triangle wider.
    """
    ratio = length / size
    reach = max(ratio, 1.0) if antialias else 1.0
    places = (np.arange(size) + 0.5) * ratio
    distance = np.abs(np.arange(length) + 0.5 - places[:, None]) / reach
    weights = np.maximum(0, 1 - distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
