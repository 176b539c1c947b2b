"""Resizing as TensorFlow does it, by sparse matrices and without TensorFlow."""

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def resize(
    image: np.ndarray,
    size: int | tuple[int, int],
    antialias: bool,
    method: str = "bilinear",
) -> np.ndarray:
    """As tf.image.resize: [h, w, 3] -> uint8 [height, width, 3].

    Args:
        size: height and width, or one number for both.
        antialias: of the method "bilinear".
        method: "bilinear" or "area".
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    if image.shape[:2] == (height, width):
        return image
    kind = "area" if method == "area" else "wide" if antialias else "bilinear"
    if height * image.shape[1] > 4 * image.shape[0] * max(width, image.shape[1]):
        # A strip: made high first it would be many times as large as it is.
        turned = resize(image.swapaxes(0, 1), (width, height), antialias, method)
        return np.ascontiguousarray(turned.swapaxes(0, 1))
    rows = _weights(image.shape[0], height, kind)
    columns = _weights(image.shape[1], width, kind)
    pixels = image.reshape(len(image), -1).astype(np.float32)
    # The columns are made rows, and rows again: [w, height * 3] -> [width, height * 3].
    turned = (rows @ pixels).reshape(height, -1, 3).swapaxes(0, 1)
    resized = (columns @ turned.reshape(len(turned), -1)).reshape(width, height, 3)
    rounded = np.clip(np.rint(resized), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded.swapaxes(0, 1))


_BLOCK = 1 << 20  # entries that are computed at once
_LONG = 1 << 14  # pixels


def _weights(length: int, size: int, kind: str) -> "csr_array":
    """float32 [size, length], rows sum to 1.

    Sparse: a new pixel comes from a few old ones. That is not only fewer products than
    a full matrix has: NumPy would share those out to threads of OpenBLAS, which wait
    for each other by computing, while pictures are read in threads of their own.

    "bilinear": a triangle around each new pixel's place; "wide": where the picture
    becomes smaller, a wider one (antialiasing); "area": how much of each old pixel a
    new one covers.
    """
    if length > _LONG:  # as large as the picture
        return _new_weights(length, size, kind)
    return _kept_weights(length, size, kind)


def _new_weights(length: int, size: int, kind: str) -> "csr_array":
    from scipy.sparse import csr_array  # training resizes with TensorFlow

    ratio = length / size
    reach = max(ratio, 1.0) if kind == "wide" else 1.0
    width = int(ratio if kind == "area" else 2 * reach) + 3  # entries of a row at most
    rows = max(1, _BLOCK // width)
    data, columns, counts = [], [], []
    for first in range(0, size, rows):
        row = np.arange(first, min(first + rows, size))[:, None]
        start = row * ratio if kind == "area" else (row + 0.5) * ratio - reach - 0.5
        column = np.floor(start).astype(np.int64) + np.arange(width)
        if kind == "area":
            weights = np.minimum(row * ratio + ratio, column + 1)
            weights = weights - np.maximum(row * ratio, column)
        else:
            weights = 1 - np.abs(column + 0.5 - (row + 0.5) * ratio) / reach
        weights *= (weights > 0) & (column >= 0) & (column < length)
        weights /= weights.sum(1, keepdims=True)
        data.append(weights[weights > 0].astype(np.float32))
        columns.append(column[weights > 0].astype(np.int32))
        counts.append((weights > 0).sum(1))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    parts = np.concatenate(data), np.concatenate(columns), starts.astype(np.int32)
    return csr_array(parts, shape=(size, length))


_kept_weights = functools.lru_cache(maxsize=64)(_new_weights)
