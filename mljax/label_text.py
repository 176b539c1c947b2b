"""Names of labels in pictures: in the script they are written in, and short enough."""

import logging
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# For what matplotlib's own font lacks; those that are installed are used.
_MORE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC"),
    *("Noto Sans KR", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    "Droid Sans Fallback",
    *("IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic", "NanumGothic"),
    *("Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai"),
)


@contextmanager
def all_scripts() -> Iterator[None]:
    """Inside a `with`, matplotlib writes with every font that it finds here.

    A letter that no font has becomes a box, without a warning for each.
    """
    import matplotlib
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    with matplotlib.rc_context({"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        log.setLevel(logging.ERROR)  # a font without the usual weight does as well
        try:
            yield
        finally:
            log.setLevel(level)


def width(text: str) -> int:
    """In columns: Chinese, Japanese and Korean letters take two, accents none."""
    shown = [c for c in text if not unicodedata.combining(c)]
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)


def shorten(text: str, most: int) -> str:
    """`text` on one line, its middle left out where it takes more columns than `most`:
    names that differ at their ends stay apart."""
    text = " ".join(text.split())
    if width(text) <= most:
        return text
    head, tail = text, text
    while width(head) > most - most // 3 - 1:
        head = head[:-1]
    while width(tail) > most // 3:
        tail = tail[1:]
    return f"{head.rstrip()}\N{HORIZONTAL ELLIPSIS}{tail.lstrip()}"
