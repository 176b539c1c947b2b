"""StableHLO, for JAX and for compilers that read it: one file, a zip.

`about.json` describes the model, `model.jax` is what `jax.export` serialises (for CPU,
NVIDIA and AMD GPUs and TPU at once), `weights.safetensors` its first argument.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mljax.errors import UserError
from mljax.formats.program import Program, check

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ABOUT, _MODEL, _WEIGHTS = "about.json", "model.jax", "weights.safetensors"


def write(program: Program, path: Path) -> None:
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict
    from jax import export
    from safetensors.numpy import save

    from mljax.models import cpu

    flat = flatten_dict(program.weights, sep=".")

    def function(weights, images):
        # A network without BatchNorm has no statistics, and nothing empty is stored.
        nested = {"batch_stats": {}} | unflatten_dict(weights, sep=".")
        return program.function(nested, images)

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *program.sides, 3), np.uint8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), flat)
    with cpu.portable_forms():
        exported = export.export(jax.jit(function), platforms=_PLATFORMS)(
            shapes, images
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(_ABOUT, json.dumps(program.about, indent=1))
        file.writestr(_MODEL, bytes(exported.serialize()))
        arrays = {name: np.ascontiguousarray(x) for name, x in flat.items()}
        file.writestr(_WEIGHTS, save(arrays))


def read(path: Path) -> tuple[Callable[[np.ndarray], Any], dict[str, Any]]:
    import jax
    from jax import export
    from safetensors.numpy import load

    try:
        with zipfile.ZipFile(path) as file:
            about = check(json.loads(file.read(_ABOUT)), path)
            exported = export.deserialize(bytearray(file.read(_MODEL)))
            weights = load(file.read(_WEIGHTS))
    except UserError:
        raise
    except Exception as error:  # flatbuffers, MLIR and safetensors have their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: is damaged, or no export ({reason}); copy or export it again"
        ) from None
    weights = jax.device_put(weights)
    call = jax.jit(exported.call)
    return lambda images: call(weights, images), about


def owns(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return _MODEL in file.namelist()


may_replace = owns
