"""Pictures of odd shapes for prediction, and what a sheet of them shows."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mljax import config, images, pictures, resizing


def dense(length: int, size: int, kind: str) -> np.ndarray:
    """The weights of a resize as a full matrix, from their definition."""
    ratio, old = length / size, np.arange(length)
    if kind == "area":
        start = np.arange(size)[:, None] * ratio
        weights = np.minimum(start + ratio, old + 1) - np.maximum(start, old)
    else:
        reach = max(ratio, 1.0) if kind == "wide" else 1.0
        places = (np.arange(size)[:, None] + 0.5) * ratio
        weights = 1 - np.abs(old + 0.5 - places) / reach
    weights = np.maximum(0, weights)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", ["bilinear", "wide", "area"])
def test_weights_of_every_size(kind, monkeypatch):
    monkeypatch.setattr(resizing, "_BLOCK", 64)  # rows come in several blocks
    sizes = [(a, b) for a in range(1, 24) for b in range(1, 24)]
    for length, size in [*sizes, (1000, 224), (224, 1000), (997, 31)]:
        found = resizing._new_weights(length, size, kind).toarray()
        np.testing.assert_allclose(found, dense(length, size, kind), rtol=1e-6)


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("shape", [(1, 2_000_000), (2_000_000, 1), (40, 50_000)])
def test_a_strip_takes_memory_as_its_pixels_do(shape, fit, antialias):
    data = config.common().data
    data.image_size, data.fit, data.antialias = 224, fit, antialias
    strip = np.zeros((*shape, 3), np.uint8)
    ramp = np.linspace(0, 255, max(shape))
    strip[..., 0] = ramp if shape[1] > shape[0] else ramp[:, None]
    tracemalloc.start()
    found = images.load(strip, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (224, 224, 3) and peak < 100 * strip[..., 0].size
    if fit == "stretch":
        ramp = np.linspace(0, 255, 224)
        along = found[..., 0] if shape[1] > shape[0] else found[..., 0].T
        np.testing.assert_allclose(along, np.broadcast_to(ramp, (224, 224)), atol=2)


def test_both_orders_of_resizing_are_the_same_picture():
    rng = np.random.default_rng(0)
    strip = rng.integers(0, 256, (9, 300, 3), np.uint8)
    found = images.resize(strip, (64, 80), antialias=True)
    above = images.resize(strip[:, :200], (64, 300), antialias=True)  # the other order
    assert found.shape == (64, 80, 3) and above.shape == (64, 300, 3)
    rows, columns = dense(9, 64, "wide"), dense(300, 80, "wide")
    expected = np.einsum("ih,hwc,jw->ijc", rows, strip, columns)
    assert np.abs(found - expected).max() <= 0.51


def test_a_picture_for_which_there_is_no_memory(monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(resizing, "_weights", refuse)
    with pytest.raises(images.UnreadableImage, match="too little memory"):
        images.load(np.zeros((5, 5, 3), np.uint8), config.common().data)


@pytest.mark.parametrize("side", [0, 1])
def test_a_gif_whose_first_frame_is_empty(side):
    file = io.BytesIO()
    Image.new("P", (6, 4)).save(file, "GIF")
    data = bytearray(file.getvalue())
    at = data.index(b",\0\0\0\0\6\0\4\0")  # left, top, width, height
    data[at + 5 + 2 * side] = 0
    with pytest.raises(images.UnreadableImage):
        images.load(bytes(data), config.common().data)


def test_what_is_not_known_is_not_wrong():
    p, above = np.array([0.9, 0.8, 0.7, 0.2]), np.full(4, 0.5)
    lines = pictures._lines(p, np.array([1, 0, -1, 1]), [*"abcd"], above)
    kinds = {colour: kind for kind, colour in pictures._COLOURS.items()}
    found = [(text[0], kinds[colour]) for text, colour in lines]
    assert found == [("a", "right"), ("b", "wrong"), ("c", "unknown"), ("d", "missed")]
