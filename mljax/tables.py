"""Tables and counts on the terminal."""

from collections.abc import Sequence

_MOST, _END = 40, 10  # lines


def ends(lines: Sequence[str], file: str) -> list[str]:
    """The lines, or of more than 40 the first and the last ten.

    file: the name of what holds them all; it is said in place of the others.
    """
    if len(lines) <= _MOST:
        return list(lines)
    left_out = f"... {len(lines) - 2 * _END} more: {file}"
    return [*lines[:_END], left_out, *lines[-_END:]]


def count(number: int, thing: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
