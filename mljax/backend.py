"""What every program tells JAX before it computes anything."""

import hashlib
import os
import platform
from pathlib import Path

import jax

_SHORTEST = 0.2  # seconds: what compiles faster is not worth a file


def set_up() -> Path:
    """Computes inline on a CPU, and turns JAX's persistent compilation cache on.

    So a second start does not compile again. Returns the cache's folder:
    `JAX_COMPILATION_CACHE_DIR` if that is set, else one below `XDG_CACHE_HOME`
    (`~/.cache`). It differs between processors: a CPU program compiled for one may hold
    instructions that another lacks, and home folders are shared between machines.
    """
    compute_inline()
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else home / "mljax" / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    return folder


def compute_inline() -> None:
    """Lets one CPU device compute in the thread that asks for it.

    JAX would hand the work to one of its own threads. There glibc maps temporary
    buffers of more than 64 MB anew for every step and gives them back after it,
    whatever `memory` sets up: only the main thread's heap can hold them. To be called
    before anything is computed; later it changes nothing.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        text = platform.processor()
    return hashlib.sha256((platform.machine() + text).encode()).hexdigest()[:12]
