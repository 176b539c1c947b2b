"""Image files and arrays -> uint8 pixels of one size, without TensorFlow.

The same pixels as in evaluation (`data.decode`, `data.fit`), up to rounding.
"""

import io
import os
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mljax.resizing import resize

GREY = 128  # of the bars beside a picture that keeps its aspect
# Those that training reads. PIL knows many more, and runs another program for one of
# them (EPS).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")


_WITHOUT_LIMIT = threading.Lock()  # PIL's limit is a global variable
_TURN = Image.Transpose
_WITH_EXIF = ("JPEG", "MPO", "PNG", "WEBP")
_TURNS = {  # what undoes an EXIF orientation
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}


class UnreadableImage(ValueError):
    """Why an image could not be read, on one line and without its name."""


def sides_of(data_config: ConfigDict) -> tuple[int, int]:
    """`data.image_size` as (height, width) in pixels."""
    size = data_config.image_size
    return tuple(size) if isinstance(size, tuple) else (size, size)


class TooLarge(UnreadableImage):
    """size: what it has, in words."""

    def __init__(self, size: str, max_pixels: int):
        super().__init__(f"{size}, more than data.max_pixels = {max_pixels}")
        self.size = size


class Box(NamedTuple):
    """A part of a picture, as shares of its height and width."""

    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0


def seen(size: tuple[int, ...], data_config: ConfigDict) -> tuple[Box, Box]:
    """How a picture of `size` (height, width) lies in what `load` makes of it.

    Returns:
        The box of the model's image that is not bars, and the box of the picture that
        is shown there.
    """
    target = sides_of(data_config)
    inside, part = Box(), Box()
    if data_config.fit == "letterbox":
        inside = _centred(_inside(size, target), target)
    elif data_config.fit == "crop":
        part = _centred(_middle_size(size, target), size)
    return inside, part


def _centred(small: tuple[int, ...], whole: tuple[int, ...]) -> Box:
    """The box of a part of this size, in the middle as `load` has it."""
    top, left = ((w - s) // 2 for s, w in zip(small, whole, strict=True))
    height, width = whole
    bottom, right = (top + small[0]) / height, (left + small[1]) / width
    return Box(top / height, left / width, bottom, right)


def load(image: Any, data_config: ConfigDict) -> np.ndarray:
    """A file or a picture as evaluation gives it to the model.

    Args:
        image: as in `read`.
        data_config: `config.data` of the model.

    Returns:
        uint8 [height, width, 3] of `sides_of(data_config)`.

    Raises:
        UnreadableImage: as in `read`.
    """
    target = sides_of(data_config)
    size, by = (0, 0), 1

    def reduction(height: int, width: int) -> int:
        nonlocal size, by
        size, by = (height, width), _reduction((height, width), target, data_config)
        return by

    pixels = read(image, data_config.max_pixels, reduction)
    if data_config.fit == "crop":
        pixels = _middle(pixels, size if by > 1 else pixels.shape[:2], by, target)
    goal = target
    if data_config.fit == "letterbox":
        goal = _inside(pixels.shape[:2], target)
    method = "area" if data_config.resize == "area" else "bilinear"
    try:
        pixels = resize(pixels, goal, data_config.antialias, method)
    except MemoryError:
        reason = "this machine has too little memory for it"
        raise UnreadableImage(reason) from None
    if goal == target:
        return pixels
    whole = np.full((*target, 3), GREY, np.uint8)
    top, left = ((t - g) // 2 for t, g in zip(target, goal, strict=True))
    whole[top : top + goal[0], left : left + goal[1]] = pixels
    return whole


def read(
    image: Any,
    max_pixels: int,
    reduction: Callable[[int, int], int] = lambda height, width: 1,
) -> np.ndarray:
    """RGB pixels of a file or a picture.

    EXIF rotation is applied, alpha is dropped, 16-bit values keep their upper
    8 bits, of an animation the first frame is taken.

    Args:
        image: a path, the bytes of a file (JPEG, PNG, BMP, GIF or WebP), a PIL image,
            or an array: uint8 [height, width, 3] or [height, width].
        max_pixels: of height * width; a larger picture is not decoded.
        reduction: (height, width) of the upright picture -> 1, 2, 4 or 8: a JPEG file
            is decoded so many times smaller.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UnreadableImage: damaged, too large, of another format, or no such file.
    """
    if isinstance(image, str | Path | bytes | Image.Image):
        try:
            if isinstance(image, Image.Image):  # which may not be decoded yet
                return _pixels(image, max_pixels)
            file = io.BytesIO(image) if isinstance(image, bytes) else image
            with _opened(file, max_pixels) as opened:
                _reduce(opened, max_pixels, reduction)
                return _pixels(opened, max_pixels)
        except UnreadableImage:
            raise
        except FileNotFoundError:
            raise UnreadableImage("no such file") from None
        except Image.UnidentifiedImageError:
            filled = image if isinstance(image, bytes) else os.path.getsize(str(image))
            reason = (
                "not an image of a known format"
                if filled
                else "the file is empty (0 bytes)"
            )
            raise UnreadableImage(reason) from None
        # PIL raises these and SyntaxError, struct.error, ... for damaged files.
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error)
            text = " ".join(reason.split())[:200]
            raise UnreadableImage(text or type(error).__name__) from None
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


def _opened(file: Any, max_pixels: int) -> Image.Image:
    """By PIL, whose own limit of a picture's size gives way to a larger one."""
    try:
        return Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        if max_pixels <= 2 * (Image.MAX_IMAGE_PIXELS or 0):  # from which on it refuses
            size = re.search(r"\d+ pixels", str(error))
            raise TooLarge(size[0] if size else "a picture", max_pixels) from None
        with _WITHOUT_LIMIT:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                opened = Image.open(file, formats=_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    if opened.width * opened.height > max_pixels:
        opened.close()
        raise TooLarge(f"{opened.width * opened.height} pixels", max_pixels)
    return opened


def _reduce(
    image: Image.Image, max_pixels: int, reduction: Callable[[int, int], int]
) -> None:
    """Makes a JPEG file that is not decoded yet decode smaller."""
    width, height = image.size
    if image.format not in ("JPEG", "MPO") or width * height > max_pixels:
        return
    by = (
        reduction(width, height)
        if _orientation(image) >= 5
        else reduction(height, width)
    )
    if by > 1:
        # PIL takes the largest reduction that leaves this size.
        image.draft(image.mode, (max(width // by, 1), max(height // by, 1)))


def _reduction(
    size: tuple[int, int], target: tuple[int, int], data_config: ConfigDict
) -> int:
    """As `_level` of `mljax.data.fit`."""
    if not data_config.scaled_decode:
        return 1
    if data_config.fit == "crop":
        size = _middle_size(size, target)
    enough = round(100 * data_config.scaled_decode)
    decides = any if data_config.fit == "letterbox" else all
    fitting = (
        by
        for by in (8, 4, 2)
        if decides(
            100 * s >= enough * t * by for s, t in zip(size, target, strict=True)
        )
    )
    return next(fitting, 1)


def _inside(size: tuple[int, ...], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture made to fit into `target`, its aspect kept."""
    height = (size[0] * target[1] + size[1] // 2) // size[1]
    width = (size[1] * target[0] + size[0] // 2) // size[0]
    return max(1, min(height, target[0])), max(1, min(width, target[1]))


def _middle_size(size: tuple[int, ...], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the largest part of a picture that has the target's shape."""
    height = (size[1] * target[0] + target[1] // 2) // target[1]
    width = (size[0] * target[1] + target[0] // 2) // target[0]
    return max(1, min(height, size[0])), max(1, min(width, size[1]))


def _middle(
    pixels: np.ndarray, size: tuple[int, ...], by: int, target: tuple[int, int]
) -> np.ndarray:
    """The middle of a picture of `size`, of which `pixels` are 1 / `by` as many."""
    parts = []
    for have, want, now in zip(
        size, _middle_size(size, target), pixels.shape, strict=False
    ):
        first = (have - want) // 2 // by
        parts.append(slice(first, min(first - (-want // by), now)))
    return pixels[tuple(parts)]


def _pixels(image: Image.Image, max_pixels: int) -> np.ndarray:
    if image.width * image.height > max_pixels:
        raise TooLarge(f"{image.height} x {image.width} pixels", max_pixels)
    form = image.format
    orientation = _orientation(image) if form in _WITH_EXIF else 1
    if orientation > 1:
        image = image.transpose(_TURNS[orientation])
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image).astype(np.int64)
        # Unless it is what PIL makes of 8 bits, which no file holds.
        if form or image.mode != "I" or grey.max(initial=0) > 255:
            grey >>= 8
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, 2)
    if form == "GIF" and not getattr(image, "tell", int)():
        return _first_frame(image)
    if image.mode == "P" and "transparency" in image.info:
        # Without this step PIL warns of a palette whose entries have an alpha each.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 to 8, as `data.decode` finds it.

    What PIL says may come from XMP, or be a number of another type.
    """
    tiff = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    order = "<" if tiff.startswith(b"II") else ">"
    try:
        (directory,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHLH", tiff, at)
            if tag == 0x0112 and kind == 3 and 1 <= value <= 8:
                return value
    except struct.error:  # it ends too early
        pass
    return 1


def _first_frame(image: Image.Image) -> np.ndarray:
    """What a GIF shows first, on black, without the canvas around it: as TensorFlow."""
    tile = getattr(image, "tile", ())  # before it is decoded: where the frame lies
    left, top, right, bottom = tile[0][1] if tile else (0, 0, *image.size)
    if left >= right or top >= bottom:
        raise UnreadableImage("its first frame has no pixels")
    frame = image.convert("RGBA")
    black = Image.new("RGBA", frame.size, (0, 0, 0, 255))
    whole = np.asarray(Image.alpha_composite(black, frame).convert("RGB"))
    return whole[top:bottom, left:right]
