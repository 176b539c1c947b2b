"""TensorFlow's SavedModel: a directory, for TensorFlow and TensorFlow Serving.

The computation is StableHLO inside one TensorFlow operation, for CPU, NVIDIA GPUs and
TPU; the weights are variables. `assets.extra/about.json` describes the model.

JAX writes StableHLO of its own time, which the last TensorFlow may be too old to read.
So it is written again in an older version: every later one reads that for five years.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mljax.errors import UserError
from mljax.formats.program import INPUT, OUTPUTS, Program, check

_PLATFORMS = ("cpu", "cuda", "tpu")
_STABLEHLO = "1.8.0"  # TensorFlow 2.21 reads up to 1.13, JAX 0.12 writes 1.18
_ABOUT = "assets.extra/about.json"
# The files that are written, but for those in variables/.
_FILES = {"saved_model.pb", "fingerprint.pb", _ABOUT}


def write(program: Program, path: Path) -> None:
    import jax
    import tensorflow as tf
    from jax import export
    from jax.extend.mlir.dialects import stablehlo
    from tensorflow.compiler.tf2xla.python import xla

    from mljax.models import cpu

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *program.sides, 3), np.uint8)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.weights
    )
    with cpu.portable_forms():
        exported = export.export(jax.jit(program.function), platforms=_PLATFORMS)(
            shapes, images
        )
    written = exported.mlir_module_serialized
    older = stablehlo.serialize_portable_artifact_str(
        stablehlo.deserialize_portable_artifact_str(written), _STABLEHLO
    )
    module = tf.Module()
    module.weights = [
        tf.Variable(np.asarray(x), trainable=False)
        for x in jax.tree.leaves(program.weights)
    ]

    def serve(images):
        given = [*module.weights, images]
        found = xla.call_module(
            [given[i] for i in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=older,
            Tout=[tf.as_dtype(out.dtype) for out in exported.out_avals],
            Sout=[(None, *out.shape[1:]) for out in exported.out_avals],
            platforms=[name.upper() for name in exported.platforms],
        )
        return {
            name: tf.identity(x, name) for name, x in zip(OUTPUTS, found, strict=True)
        }

    given = tf.TensorSpec((None, *program.sides, 3), tf.uint8, INPUT)
    module.serve = tf.function(serve, input_signature=[given], autograph=False)
    tf.saved_model.save(module, str(path), signatures=module.serve)
    (path / _ABOUT).parent.mkdir()
    (path / _ABOUT).write_text(json.dumps(program.about, indent=1), encoding="utf-8")


def read(path: Path) -> tuple[Callable[[np.ndarray], Any], dict[str, Any]]:
    import tensorflow as tf

    try:
        about = check(json.loads((path / _ABOUT).read_text(encoding="utf-8")), path)
        module = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow has many, IndexError among them
        raise UserError(f"{path}: is damaged, or no export ({error})") from None
    serve = module.signatures["serving_default"]

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            found = serve(**{INPUT: tf.constant(images)})
        except tf.errors.InvalidArgumentError as error:
            if "deserialize" not in str(error):
                raise
            raise UserError(
                f"savedmodel: TensorFlow {tf.__version__} cannot read its StableHLO "
                f"{_STABLEHLO}; use a newer TensorFlow, or export as stablehlo or onnx"
            ) from None
        return tuple(found[name].numpy() for name in OUTPUTS)

    # A signature does not keep alive what it was loaded from.
    run.module = module  # type: ignore[attr-defined]
    return run, about


def owns(path: Path) -> bool:
    return (path / "saved_model.pb").is_file()


def may_replace(path: Path) -> bool:
    try:
        check(json.loads((path / _ABOUT).read_text(encoding="utf-8")), path)
    except (OSError, ValueError, UserError):
        return False
    files = [part for part in path.rglob("*") if not part.is_dir()]
    others = {str(part.relative_to(path)) for part in files} - _FILES
    return all(name.startswith("variables/variables.") for name in others)
