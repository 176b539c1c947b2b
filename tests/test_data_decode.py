import io
import re
import struct

import numpy as np
import pytest
import tensorflow as tf
from data_trees import blocks, encode
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from mljax import images
from mljax.data import decode

LIMIT = 10**6
PIXELS = blocks()
ALPHA = np.dstack([PIXELS, PIXELS[:, :, :1]])


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
def decoded(data):
    return decode.decode(data, LIMIT)


def by_pil(data: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return np.asarray(image.convert("RGB"))


def ycck(data: bytes) -> bytes:
    """The same CMYK JPEG, its four channels taken as YCCK."""
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\2" + data[at + 1 :]


IMAGE = Image.fromarray(PIXELS)
CMYK = encode(IMAGE.convert("CMYK"))
FILES = {
    "jpeg": encode(PIXELS),
    "progressive": encode(PIXELS, progressive=True),
    "grey": encode(IMAGE.convert("L")),
    "cmyk": CMYK,
    "ycck": ycck(CMYK),
    "png": encode(PIXELS, "PNG"),
    "png grey": encode(IMAGE.convert("L"), "PNG"),
    "png grey and alpha": encode(IMAGE.convert("LA"), "PNG"),
    "png black and white": encode(IMAGE.convert("1"), "PNG"),
    "png palette": encode(IMAGE.convert("P"), "PNG"),
    "png alpha": encode(ALPHA, "PNG"),
    "bmp": encode(PIXELS, "BMP"),
    "bmp grey": encode(IMAGE.convert("L"), "BMP"),
    "bmp palette": encode(IMAGE.convert("P"), "BMP"),
    "bmp 32 bits": encode(ALPHA, "BMP"),
    "gif": encode(PIXELS, "GIF"),
    "gif animation": encode(
        PIXELS, "GIF", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]
    ),
    "webp": encode(PIXELS, "WEBP"),
    "webp lossless": encode(PIXELS, "WEBP", lossless=True),
    "webp alpha": encode(ALPHA, "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_agrees_with_pil(name):
    np.testing.assert_array_equal(decoded(FILES[name]), by_pil(FILES[name]))


def gif(transparent: bool, canvas: tuple[int, int]) -> bytes:
    """A green square on white in the first frame, on a canvas of (width, height)."""
    pixels = np.zeros((20, 20), np.uint8)
    pixels[5:15, 5:15] = 1
    image = Image.fromarray(pixels, "P")
    image.putpalette([255, 255, 255, 10, 200, 30] + [0] * 762)
    data = bytearray(
        encode(image, "GIF", **({"transparency": 0} if transparent else {}))
    )
    data[6:10] = struct.pack("<HH", *canvas)
    return bytes(data)


@pytest.mark.parametrize("canvas", [(20, 20), (40, 30)])
@pytest.mark.parametrize("transparent", [True, False])
def test_a_gif_is_the_same_in_training_and_prediction(transparent, canvas):
    data = gif(transparent, canvas)
    pixels = decoded(data).numpy()
    assert pixels[0, 0].tolist() == [0 if transparent else 255] * 3
    np.testing.assert_array_equal(images.read(data, LIMIT), pixels)


def test_16_bits_keep_the_upper_8():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    image = decoded(encode(values, "PNG"))
    np.testing.assert_array_equal(image[:, :, 0], values >> 8)


def exif_bytes(orientation: int, order: str) -> bytes:
    """An Exif block whose first directory has three entries, orientation between."""
    entries = [(0x010F, 2, 4, b"abc\0"), (0x0131, 2, 4, b"def\0")]
    value = struct.pack(order + "HH", orientation, 0)
    entries.insert(1, (0x0112, 3, 1, value))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    body = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(order + "HHI", tag, kind, count) + value
    return b"Exif\0\0" + head + body + struct.pack(order + "I", 0)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation, order):
    data = encode(PIXELS, exif=exif_bytes(orientation, order))
    assert decode.exif_orientation(data) == max(1, orientation % 9)
    np.testing.assert_array_equal(decoded(data), by_pil(data))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_exif_orientation_of_other_formats(form, order):
    more = {"lossless": True} if form == "WEBP" else {}
    pixels = PIXELS[:, :-1]  # so that the chunk of a WebP may have an odd length
    for orientation in range(10):
        exif = exif_bytes(orientation, order)
        for written in (exif, exif.removeprefix(b"Exif\0\0"), exif + b"\0"):
            data = encode(pixels, form, exif=written, **more)
            np.testing.assert_array_equal(decoded(data), by_pil(data))
            np.testing.assert_array_equal(decoded(data), images.read(data, 10**6))
    # With a text before it and bytes that look like it in the wrong place.
    if form == "PNG":
        text = PngInfo()
        text.add_text("Comment", "eXIf" * 9)
        plain = encode(pixels, form, pnginfo=text)
        np.testing.assert_array_equal(decoded(plain), pixels)
        turned = encode(pixels, form, pnginfo=text, exif=exif_bytes(6, order))
        np.testing.assert_array_equal(decoded(turned), np.rot90(pixels, -1))


def test_exif_behind_other_segments():
    plain = encode(PIXELS, comment=b"Exif\0\0 in a comment")
    exif = exif_bytes(6, ">")
    at = plain.index(b"\xff\xfe")  # the comment
    end = at + 2 + int.from_bytes(plain[at + 2 : at + 4], "big")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert decode.exif_orientation(plain) == 1
    assert decode.exif_orientation(plain[:end] + segment + plain[end:]) == 6
    # A long segment with bytes in it that look like the beginning of a frame header.
    other = b"\0\x0b\x08".ljust(3000, b"x")
    other = b"\xff\xed" + struct.pack(">H", len(other) + 2) + other
    assert decode.exif_orientation(plain[:at] + other + segment + plain[at:]) == 6


def test_damaged_exif_counts_as_upright():
    data = bytearray(encode(PIXELS, exif=exif_bytes(6, "<")))
    at = data.index(b"II*\0") + 4
    for offset in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"):
        data[at : at + 4] = offset
        assert decode.exif_orientation(bytes(data)) == 1


def png_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(PIXELS, "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data)


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(PIXELS))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_of_size(width: int, height: int) -> bytes:
    data = encode(PIXELS, "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def bmp_of_size(width: int, height: int) -> bytes:
    data = encode(PIXELS, "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def webp_of_size(width: int, height: int) -> bytes:
    data = encode(PIXELS, "WEBP")
    return data[:26] + struct.pack("<HH", width, height) + data[30:]


def lossless_of_size(width: int, height: int) -> bytes:
    data = encode(PIXELS, "WEBP", lossless=True)
    packed = (width - 1) | (height - 1) << 14
    return data[:21] + struct.pack("<I", packed) + data[25:]


def alpha_of_size(width: int, height: int) -> bytes:
    data = encode(ALPHA, "WEBP")
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return data[:24] + size + data[30:]


@pytest.mark.parametrize(
    "make",
    [
        jpeg_of_size,
        png_of_size,
        gif_of_size,
        bmp_of_size,
        webp_of_size,
        lossless_of_size,
        alpha_of_size,
    ],
)
def test_size_is_checked_before_decoding(make):
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="1001 x 1000 pixels, more"
    ):
        decoded(make(1001, 1000))


def test_bmp_with_rows_from_the_top():
    data = bytearray(encode(PIXELS, "BMP"))
    data[22:26] = struct.pack("<i", -len(PIXELS))
    np.testing.assert_array_equal(decoded(bytes(data)), PIXELS[::-1])


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_bmp_with_bytes_behind_the_pixels(mode):
    """Photoshop writes two, others a colour profile."""
    whole = encode(IMAGE.convert(mode), "BMP")
    for more in (b"\0\0", b"profile" * 99):
        np.testing.assert_array_equal(decoded(whole + more), decoded(whole))


TRUNCATED = {
    f"{name} {cut}": FILES[name][: len(FILES[name]) * cut // 100]
    for name in ("jpeg", "progressive", "png", "bmp", "webp", "gif")
    for cut in (20, 60, 99)
}
BROKEN = TRUNCATED | {
    "empty": b"",
    "text": b"<html>not found</html>",
    "jpeg head only": b"\xff\xd8\xff",
    "png head only": FILES["png"][:12],
    "bmp black and white": encode(IMAGE.convert("1"), "BMP"),
    "webp animation": encode(
        PIXELS, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_errors(name):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decoded(BROKEN[name])


def test_mutated_files_decode_or_are_errors():
    rng = np.random.default_rng(0)
    exif = encode(PIXELS, exif=exif_bytes(6, ">"))
    for data in [exif, *(FILES[n] for n in ("png palette", "bmp palette", "webp"))]:
        for _ in range(25):
            changed = bytearray(data)
            for at in rng.integers(0, min(len(data), 200), 3):
                changed[at] = rng.integers(256)
            try:
                assert decoded(bytes(changed)).shape[2] == 3
            except tf.errors.OpError as error:
                assert re.search(r"\w", error.message)


@pytest.mark.parametrize("how", ["eager", "in a function", "in a dataset"])
def test_the_reason_is_without_a_trace(how):
    data = tf.constant(encode(blocks(), "PNG")[:200])

    def read(data):
        return decode.decode(data, 10**6)

    with pytest.raises(tf.errors.OpError) as error:
        if how == "eager":
            read(data)
        elif how == "in a function":
            tf.function(read)(data)
        next(iter(tf.data.Dataset.from_tensors(data).map(read)))
    assert decode.reason(error.value) == "Invalid PNG data, size 200"
    # Where TensorFlow has lost what it would trace.
    said = (
        "Detected at node a defined at (most recent call last):\n{}\nInvalid PNG data"
    )
    untraced = said.format("<stack traces unavailable>")
    untraced = tf.errors.InvalidArgumentError(None, None, untraced)
    assert decode.reason(untraced) == "Invalid PNG data"


@pytest.mark.parametrize("how", ["alone", "in a dataset"])
def test_the_reason_is_what_is_wrong_with_the_file(tmp_path, how):
    path = str(tmp_path / "not there.jpg")
    with pytest.raises(tf.errors.OpError) as error:
        if how == "alone":
            tf.io.read_file(path)
        files = tf.data.Dataset.from_tensor_slices([path])
        next(iter(files.map(tf.io.read_file)))
    assert decode.reason(error.value) == f"{path}; No such file or directory"
