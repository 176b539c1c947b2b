"""Encoded bytes -> RGB pixels, with TensorFlow operations only.

JPEG (grey, CMYK, progressive), PNG, GIF (first frame), BMP and WebP, told apart by
their first bytes, not by the file name. They are turned as their EXIF orientation
says. The size is read from the header before anything is decoded, so that a
decompression bomb costs nothing. A truncated file is an error, never a grey area.
"""

import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import tensorflow as tf

T = TypeVar("T")

# A branch that is rarely taken, as one node of the graph. Written out in place its
# hundreds of nodes are visited for every image, which costs as much as decoding a
# small JPEG.
rare = tf.function(autograph=False, experimental_attributes={"_noinline": True})

_MAX_TIFF_ENTRIES = 256  # more than any camera writes
_MAX_CHUNKS = 100  # before what is looked for


def decode(data: tf.Tensor, max_pixels: int) -> tf.Tensor:
    """The picture in an encoded file, turned as its EXIF orientation says.

    Alpha is dropped and 16-bit values keep their upper 8 bits.

    Args:
        data: string scalar, the bytes of the file.
        max_pixels: a picture with more pixels (height * width) is not decoded.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        tf.errors.InvalidArgumentError: when it runs, for a file that is damaged, too
            large or of another format.
    """
    image = tf.cond(
        is_jpeg(data),
        lambda: _decode_jpeg(data, max_pixels),
        lambda: _decode_other(data, max_pixels),
    )
    image.set_shape([None, None, 3])
    return image


def is_jpeg(data: tf.Tensor) -> tf.Tensor:
    """Whether a file, string scalar, says that it is a JPEG."""
    return _text(data, 0, 3) == b"\xff\xd8\xff"


def jpeg_size(data: tf.Tensor, max_pixels: int) -> tf.Tensor:
    """[height, width] of a JPEG as it is stored, int32. Errors as in `decode`."""
    size = tf.io.extract_jpeg_shape(data)[:2]
    with tf.control_dependencies([_check_size(size[0], size[1], max_pixels)]):
        return tf.identity(size)


def reason(error: tf.errors.OpError) -> str:
    """Why an image could not be read, on one line: what TensorFlow says of the file,
    without where in its graph."""
    message = re.sub(r"\{\{[^}]*\}\}|\[\[.*?\]\]|\[Op:[^\]]*\]", "", error.message)
    if asserted := re.search(r"assertion failed: \[(.*?)\]", message):
        return " ".join(asserted.group(1).split())
    graph = ("Graph execution error", "Detected at node", "File ", "<stack traces")
    lines = (line.strip() for line in message.splitlines())
    text = " ".join(" ".join(x for x in lines if not x.startswith(graph)).split())
    # Where a dataset ran it, its words stand around those on the file.
    text = re.sub(r"^Error in user-defined function .*? iterator: \S+: ", "", text)
    return text.removesuffix(" name:")


# What a file system says that does not answer: it is no fault of the file.
AWAY = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError)
OF_FILE = (
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.DataLossError,
    tf.errors.PermissionDeniedError,
    tf.errors.OutOfRangeError,
    tf.errors.UnimplementedError,
)
PAUSES, _FEW = (1, 2, 4, 8, 16), 2  # seconds


def patiently(read: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
    """What `read` gives. It is tried again after an error that may pass: for half a
    minute where a file system is away, for some seconds after others, as where too many
    files were open."""
    for pause in pauses:
        try:
            return read()
        except OF_FILE:
            raise
        except AWAY:
            time.sleep(pause)
        except tf.errors.OpError:
            if pause > _FEW:
                raise
            time.sleep(pause)
    return read()


def exif_orientation(data: tf.Tensor) -> tf.Tensor:
    """The EXIF orientation of a JPEG file, int64 scalar 1 to 8; 1 where it has none.

    `data` is a string scalar. Tag 0x0112 of the first directory (Exif 2.3, section
    4.6.4), in the first segment that holds Exif data.
    """
    # A look at the text first: most files say nothing, and the search is slow. Most
    # also have their frame header near the start (length, 8 bits, height and width,
    # 1, 3 or 4 channels), and Exif comes before that.
    channels = r"(\x0b\x08\C{4}\x01|\x11\x08\C{4}\x03|\x14\x08\C{4}\x04)"
    exif, frame = r"\C*Exif\x00\x00\C*", rf"\C*\x00{channels}\C*"
    start = _text(data, 0, 2**11)
    has_exif = tf.strings.regex_full_match(start, exif) | tf.cond(
        tf.strings.regex_full_match(start, frame),
        lambda: tf.constant(False),
        lambda: tf.strings.regex_full_match(_text(data, 0, 2**17), exif),
    )
    one = tf.constant(1, tf.int64)
    return tf.cond(has_exif, lambda: _find_orientation(data), lambda: one)


@rare
def _find_orientation(data: tf.Tensor) -> tf.Tensor:
    # A JPEG file is a list of segments: 0xFF, marker, length in two bytes (counting
    # itself), content. Exif stands in an APP1 segment (0xE1) before the first frame
    # header (0xC0); APPn, comments and tables (0xC4, 0xDB to 0xFE) may come earlier.

    def is_searching(pos: tf.Tensor, tiff: tf.Tensor) -> tf.Tensor:
        marker = _bytes(data, pos, 2)
        is_table = (marker[1] == 0xC4) | ((marker[1] >= 0xDB) & (marker[1] < 0xFF))
        return (tiff == 0) & (marker[0] == 0xFF) & is_table

    def advance(pos: tf.Tensor, tiff: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        segment = _bytes(data, pos, 4)
        is_exif = (segment[1] == 0xE1) & (_text(data, pos + 4, 6) == b"Exif\0\0")
        length = segment[2] * 256 + segment[3]
        return pos + 2 + length, tf.where(is_exif, pos + 10, tiff)

    start = (tf.constant(2, tf.int64), tf.constant(0, tf.int64))
    _, tiff = tf.while_loop(is_searching, advance, start, parallel_iterations=1)
    one = tf.constant(1, tf.int64)
    return tf.cond(tiff > 0, lambda: _tiff_orientation(data, tiff), lambda: one)


def _tiff_orientation(data: tf.Tensor, tiff: tf.Tensor) -> tf.Tensor:
    """The orientation in the TIFF structure that starts at byte `tiff` of `data`."""
    is_little = _text(data, tiff, 2) == b"II"

    def number(raw: tf.Tensor) -> tf.Tensor:
        return _little(tf.where(is_little, raw, tf.reverse(raw, [-1])))

    # A directory: number of entries, then 12 bytes each: tag, type (3 = 16-bit),
    # count, value.
    directory = tiff + number(_bytes(data, tiff + 4, 4))
    num_entries = tf.minimum(number(_bytes(data, directory, 2)), _MAX_TIFF_ENTRIES)
    entries = tf.reshape(
        _bytes(data, directory + 2, 12 * _MAX_TIFF_ENTRIES), [_MAX_TIFF_ENTRIES, 12]
    )
    found = (
        (tf.range(_MAX_TIFF_ENTRIES, dtype=tf.int64) < num_entries)
        & (number(entries[:, 0:2]) == 0x0112)
        & (number(entries[:, 2:4]) == 3)
    )
    value = tf.reduce_max(tf.where(found, number(entries[:, 8:10]), 0))
    return tf.where((value >= 1) & (value <= 8), value, 1)


def _decode_jpeg(data: tf.Tensor, max_pixels: int) -> tf.Tensor:
    with tf.control_dependencies([jpeg_size(data, max_pixels)]):
        # INTEGER_ACCURATE gives the pixels that PIL gives; TensorFlow's default
        # differs by up to 2 and is no faster.
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    orientation = exif_orientation(data)
    return tf.cond(orientation > 1, lambda: turn(image, orientation), lambda: image)


@rare
def turn(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undoes an EXIF orientation; 5 to 8 are 1 to 4 of the transposed picture."""
    image = tf.cond(
        orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image
    )
    kind = (orientation - 1) % 4  # 0: none, 1: mirrored, 2: by 180 degrees, 3: flipped
    is_upside_down, is_mirrored = kind >= 2, (kind == 1) | (kind == 2)
    dims = tf.stack([is_upside_down, is_mirrored, False])
    return tf.raw_ops.Reverse(tensor=image, dims=dims)


@rare
def _decode_other(data: tf.Tensor, max_pixels: int) -> tf.Tensor:
    head = _bytes(data, 0, 34)

    def sized(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        """The data, once the size is found to be acceptable."""
        with tf.control_dependencies([_check_size(height, width, max_pixels)]):
            return tf.identity(data)

    def png() -> tf.Tensor:
        image = _first_frame(sized(_big(head[20:24]), _big(head[16:20])))

        # Chunks: length, name, content, check sum. Exif comes before the pixels.
        def name(pos: tf.Tensor) -> tf.Tensor:
            return _text(data, pos + 4, 4)

        def following(pos: tf.Tensor) -> tf.Tensor:
            return pos + 12 + _big(_bytes(data, pos, 4))

        at = _find_chunk(8, name, (b"eXIf", b"IDAT"), following)
        return _upright(image, data, at + 8, name(at) == b"eXIf")

    def gif() -> tf.Tensor:
        return _first_frame(sized(_little(head[8:10]), _little(head[6:8])))

    def bmp() -> tf.Tensor:
        height = _little(head[22:26])
        height = tf.minimum(height, 2**32 - height)  # negative: rows from the top
        return _decode_bmp(sized(height, _little(head[18:22])), head)

    def webp() -> tf.Tensor:
        image = _decode_webp(sized(*_webp_size(head)), head)

        # Chunks: name, length, content to an even length. A flag says whether Exif is
        # among them.
        def name(pos: tf.Tensor) -> tf.Tensor:
            return _text(data, pos, 4)

        def following(pos: tf.Tensor) -> tf.Tensor:
            length = _little(_bytes(data, pos + 4, 4))
            return pos + 8 + length + length % 2

        def turned() -> tf.Tensor:
            at = _find_chunk(12, name, (b"EXIF",), following)
            return _upright(image, data, at + 8, name(at) == b"EXIF")

        has_exif = (head[15] == ord("X")) & ((head[20] // 8) % 2 == 1)
        return tf.cond(has_exif, turned, lambda: image)

    def unknown() -> tf.Tensor:
        is_empty = tf.strings.length(data) == 0
        other = "not a JPEG, PNG, GIF, BMP or WebP file"
        refuse = _require(False, tf.where(is_empty, "the file is empty", other))
        with tf.control_dependencies([refuse]):
            return tf.zeros([1, 1, 3], tf.uint8)

    is_webp = (_text(data, 0, 4) == b"RIFF") & (_text(data, 8, 4) == b"WEBP")
    return tf.case(
        [
            (_text(data, 0, 8) == b"\x89PNG\r\n\x1a\n", png),
            (_text(data, 0, 4) == b"GIF8", gif),
            (_text(data, 0, 2) == b"BM", bmp),
            (is_webp, webp),
        ],
        default=unknown,
    )


def _find_chunk(
    start: int,
    name: Callable[[tf.Tensor], tf.Tensor],
    last: tuple[bytes, ...],
    following: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """The place of the first chunk called one of `last`, int64 scalar.

    name: of the chunk at a place, empty past the end; following: the place behind it.
    """

    def is_searching(pos: tf.Tensor) -> tf.Tensor:
        return tf.reduce_all(name(pos) != tf.constant([*last, b""]))

    (found,) = tf.while_loop(
        is_searching,
        lambda pos: (following(pos),),
        (tf.constant(start, tf.int64),),
        parallel_iterations=1,
        maximum_iterations=_MAX_CHUNKS,
    )
    return found


def _upright(
    image: tf.Tensor, data: tf.Tensor, exif: tf.Tensor, has_exif: tf.Tensor
) -> tf.Tensor:
    """`image`, turned as the Exif data that begin at byte `exif` of its file say."""
    has_prefix = _text(data, exif, 6) == b"Exif\0\0"  # as in a JPEG; some write it
    tiff = exif + 6 * tf.cast(has_prefix, tf.int64)
    one = tf.constant(1, tf.int64)
    orientation = tf.cond(has_exif, lambda: _tiff_orientation(data, tiff), lambda: one)
    return tf.cond(orientation > 1, lambda: turn(image, orientation), lambda: image)


def _first_frame(data: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_image(data, channels=3, expand_animations=False)


def _decode_bmp(data: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    header_size, bits, compression = head[14], head[28], _little(head[30:34])
    is_plain = (compression == 0) | ((compression == 3) & (bits == 32))
    check = _require(
        (header_size >= 40) & is_plain & ((bits == 8) | (bits == 24) | (bits == 32)),
        "a BMP file with compression or of an unusual depth",
    )
    # What some programs write behind the pixels TensorFlow refuses.
    bits_wide = _little(head[18:22]) * tf.cast(bits, tf.int64)
    height = _little(head[22:26])
    rows = (bits_wide + 31) // 32 * 4 * tf.minimum(height, 2**32 - height)
    with tf.control_dependencies([check]):
        data = tf.strings.substr(
            data, 0, tf.cast(_little(head[10:14]) + rows, tf.int32)
        )

    def palette() -> tf.Tensor:
        # TensorFlow takes the index into the palette for a grey value.
        colours = tf.reshape(_bytes(data, 14 + header_size, 4 * 256), [256, 4])
        colours = tf.cast(colours[:, 2::-1], tf.uint8)  # stored as blue, green, red, 0
        index = tf.io.decode_bmp(data)[:, :, 0]
        return tf.gather(colours, tf.cast(index, tf.int32))

    return tf.cond(bits == 8, palette, lambda: _first_frame(data))


def _webp_size(head: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width, from the first chunk: VP8X, VP8L (lossless) or VP8 (lossy)."""
    packed = _little(head[21:25])  # VP8L: 14 bits width - 1, then 14 bits height - 1
    sizes = tf.stack(
        [
            tf.stack([_little(head[28:30]), _little(head[26:28])]) % 2**14,
            tf.stack([packed // 2**14, packed]) % 2**14 + 1,
            tf.stack([_little(head[27:30]), _little(head[24:27])]) + 1,
        ]
    )
    kind = tf.where(head[15] == ord("L"), 1, tf.where(head[15] == ord("X"), 2, 0))
    return sizes[kind, 0], sizes[kind, 1]


def _decode_webp(data: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    # TensorFlow 2.21 writes past the end of its buffer for an animation without alpha.
    is_animated = (head[15] == ord("X")) & ((head[20] // 2) % 2 == 1)
    check = _require(~is_animated, "an animated WebP file")
    with tf.control_dependencies([check]):
        # channels=3 is refused where the file has an alpha channel.
        return tf.io.decode_image(data, channels=0, expand_animations=False)[:, :, :3]


def _check_size(height: tf.Tensor, width: tf.Tensor, max_pixels: int) -> tf.Operation:
    height, width = tf.cast(height, tf.int64), tf.cast(width, tf.int64)
    message = tf.strings.format(
        "{} x {} pixels, more than data.max_pixels = {}", (width, height, max_pixels)
    )
    return _require(height * width <= max_pixels, message)


def _require(condition: tf.Tensor | bool, message: tf.Tensor | str) -> tf.Operation:
    return tf.debugging.Assert(condition, [message])


def _text(data: tf.Tensor, pos: tf.Tensor | int, count: tf.Tensor | int) -> tf.Tensor:
    """Bytes pos to pos + count as a string scalar; shorter past the end of the data."""
    end = tf.strings.length(data, "BYTE")
    pos = tf.clip_by_value(tf.cast(pos, tf.int64), 0, tf.cast(end, tf.int64))
    return tf.strings.substr(data, pos, tf.cast(count, tf.int64), "BYTE")


def _bytes(data: tf.Tensor, pos: tf.Tensor | int, count: int) -> tf.Tensor:
    """Bytes pos to pos + count as int64 [count]; zeros past the end of the data."""
    raw = tf.io.decode_raw(_text(data, pos, count), tf.uint8, fixed_length=count)
    return tf.cast(tf.ensure_shape(raw, [count]), tf.int64)


def _little(raw: tf.Tensor) -> tf.Tensor:
    """int64 [..., n] bytes -> int64 [...], least significant byte first."""
    return tf.reduce_sum(raw * [256**k for k in range(raw.shape[-1])], -1)


def _big(raw: tf.Tensor) -> tf.Tensor:
    return _little(tf.reverse(raw, [0]))
