"""Compiled programs are kept on disk: the second start does not compile again."""

import hashlib
import os
import platform
from pathlib import Path

import jax

_SHORTEST = 0.2  # seconds: what compiles faster is not worth a file


def enable() -> Path:
    """Turns JAX's persistent compilation cache on and returns its folder.

    The folder is `JAX_COMPILATION_CACHE_DIR` if that is set, else one below
    `XDG_CACHE_HOME` (`~/.cache`). It differs between processors: a CPU program
    compiled for one may hold instructions that another lacks, and home folders are
    shared between machines.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else home / "mljax" / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    return folder


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        text = platform.processor()
    return hashlib.sha256((platform.machine() + text).encode()).hexdigest()[:12]
