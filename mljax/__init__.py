"""mljax: multi-label image classification in JAX.

Its modules are imported when they are first named: `import mljax`, then
`mljax.predict.load(...)`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    module = f"{__name__}.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise AttributeError(f"mljax has no {name!r}") from None
