"""Which programs are at work; kept with every checkpoint."""

import platform
from importlib import metadata

from mljax import __version__

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow-cpu",
    "tensorflow",
    "pillow",
)


def installed() -> dict[str, str]:
    """Name -> version of mljax, Python and what the numbers depend on."""
    found = {"mljax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
