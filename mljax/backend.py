"""What every program tells JAX before it computes anything."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from mljax.errors import Temporary

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


def check_platform(path: str | Path, before: str | None) -> None:
    """A run of a GPU or TPU does not go on on a CPU unless that is asked for.

    JAX falls back on the CPU where a driver does not start; days later a restarted run
    would have come no further.

    Args:
        path: the work directory, to name it.
        before: the platform that its last step was computed on, or None (unknown).

    Raises:
        Temporary: it was another than "cpu", which is what there is now.
    """
    if before in (None, "cpu") or jax.default_backend() != "cpu":
        return
    asked = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    asked = asked or os.environ.get("JAX_PLATFORM_NAME", "")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if asked.split(",")[0] != "cpu" and not hidden:  # JAX_PLATFORMS does that, too
        extra = {"gpu": "cuda"}.get(before, before)
        raise Temporary(  # another machine of the cluster may have it
            f"{path}: was computed on a {before.upper()} so far, and JAX finds only a "
            f"CPU here: is its driver there, and mljax installed with [{extra}]? With "
            "JAX_PLATFORMS=cpu before the command it goes on on the CPU"
        )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        text = platform.processor()
    return hashlib.sha256((platform.machine() + text).encode()).hexdigest()[:12]
