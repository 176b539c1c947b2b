"""Memory for XLA on the CPU: huge pages, kept between steps.

XLA allocates the temporary buffers of every step anew. glibc gives large blocks back
to the kernel at once, and fresh pages cost several times the arithmetic done on them:
doubling a 67 MB array takes 19 ms, and 4 ms where the pages are kept. Pages of 2 MB
instead of 4 KB make a training step of MobileNetV3 another fifth faster.
"""

import glob
import importlib.util
import os
import sys
from importlib.metadata import entry_points

# Nothing is mapped apart, nothing given back, of what the main thread asks for. Another
# thread's heap is at most 64 MB, and what is larger is mapped apart whatever is set:
# `backend` therefore computes in the main thread. With one heap for all threads, the
# search for a free block among those that compiling left behind took 14 % of a
# training step's time. 2.35 is the first with huge pages, and what a version does not
# know it leaves out. Read by glibc as the program starts.
_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=4:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1000000000000"
)


def restart_tuned() -> None:
    """Starts this program again, with glibc's allocator set up for XLA on the CPU.

    Only where it helps: on Linux, without accelerators (there the CPU only reads data,
    with many threads, which one heap would hold up), and if GLIBC_TUNABLES is not set
    already. To be called first of all, by a program of one process.
    """
    if tuned := tunables():
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | tuned)


def tunables() -> dict[str, str]:
    """What `restart_tuned` puts into the environment; nothing where it does nothing."""
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": _TUNABLES} if _computes_on_cpu() else {}


def peak_bytes() -> int:
    """Most bytes in use so far: of the fullest device here, on CPU of this program."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    used = [found["peak_bytes_in_use"] for found in stats if found]
    if used:
        return max(used)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _computes_on_cpu() -> bool:
    """Whether JAX will have no accelerator, told without starting a backend."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    # Beside packages, as benchmarks ask for them too, there must be a device.
    plugins = {plugin.name for plugin in entry_points(group="jax_plugins")}
    cuda = {name for name in plugins if "cuda" in name}
    if importlib.util.find_spec("libtpu") is not None and _is_there(*_TPU):
        return False
    return plugins <= cuda and not (cuda and _is_there(*_NVIDIA))


_TPU = ("/dev/accel*", "/dev/vfio/[0-9]*")
_NVIDIA = ("/dev/nvidia[0-9]*", "/dev/nvhost*", "/dev/dxg")


def _is_there(*patterns: str) -> bool:
    return any(map(glob.glob, patterns))
