"""The exceptions whose message is meant for the person at the terminal."""

import errno
import os
import shlex
import sys

# "Temporary failure, try again" (EX_TEMPFAIL of sysexits.h): what launchers restart
# upon. 143 would not do: shells give it for a process that SIGTERM killed before it
# could save anything.
RESTART = 75

# With the Python that runs, which a shell may call by another name.
PIP = f"{shlex.quote(sys.executable)} -m pip install"


class UserError(ValueError):
    """Something the user gave is wrong. `main` prints the message as one line.

    The message names the thing (key, file, class) and says what to do.
    """


class Temporary(UserError):
    """What another start of the same command may not meet: a disk was away."""


class Stopped(Exception):
    """A run that was asked to stop, and has saved what it had done.

    exit_code: of the program, see `mljax.preemption`.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def complain(text: str) -> None:
    """Prints on stderr. That nobody reads it any more (Ctrl-C ends `| tee` too) is no
    error: what is to be saved then must be."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115 (until the end)


_AWAY = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED),
)


def exit_code(error: BaseException | None) -> int:
    """Of a program that ends with `error`: 75 where it, or what it came of, says that a
    file system or a host did not answer; else 1."""
    while error is not None:
        away = isinstance(error, OSError) and error.errno in _AWAY
        if away or isinstance(error, Temporary):
            return RESTART
        error = error.__cause__ or error.__context__
    return 1


def one_line(error: BaseException) -> str | None:
    """What to say of an error that a user can cause; None for one of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        # A full disk, a folder without permission: the name and the reason suffice.
        where = f"{error.filename}: " if error.filename is not None else ""
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space there, or name another place" * is_full
        return f"{where}{error.strerror or error}{advice}"
    if isinstance(error, MemoryError):
        return (
            "this machine has too little memory: lower config.batch_size, "
            "config.eval.batch_size or config.data.image_size"
        )
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # of XLA
        return (
            "the device has too little memory: lower config.batch_size (in an "
            "evaluation config.eval.batch_size) or config.data.image_size, raise "
            "config.optim.accumulate (a batch in parts), or set config.model.remat = "
            "true"
        )
    return None
