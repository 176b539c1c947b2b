"""Files that are there whole or not at all, and errors of writing that name them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mljax.errors import UserError

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Raises OSError with the name `path` where the disk is full or fails.

    write() knows no names, so its errors have none. Libraries raise kinds of their own
    instead (TensorFlow), with the system's words in them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "filename", None) is not None:
            raise
        for number in _OF_WRITING:
            if (reason := os.strerror(number)) in str(error):
                raise OSError(number, reason, str(path)) from error
        raise


def part_of(file: Path) -> Path:
    """Where `file` is while it is written."""
    return file.with_name(f".{file.name}.part")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives the path to write to; what is there in the end becomes `file`.

    After an error `file` is as it was. Errors are as those of `named`.
    """
    part = part_of(file)
    try:
        with named(file):
            yield part
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)
