"""TensorFlow's SavedModel: a directory, for TensorFlow and TensorFlow Serving.

The computation is StableHLO inside one TensorFlow operation, for CPU, NVIDIA GPUs and
TPU; the weights are variables. `assets.extra/about.json` describes the model.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mljax.errors import UserError
from mljax.formats.program import INPUT, OUTPUTS, Program, check

_PLATFORMS = ("cpu", "cuda", "tpu")
_ABOUT = "assets.extra/about.json"


def write(program: Program, path: Path) -> None:
    import jax
    import tensorflow as tf
    from jax.experimental import jax2tf

    from mljax.models import cpu

    def function(weights, images):
        return dict(zip(OUTPUTS, program.function(weights, images), strict=True))

    with cpu.portable_forms():
        converted = jax2tf.convert(
            function,
            polymorphic_shapes=[None, "(batch, ...)"],
            with_gradient=False,
            native_serialization_platforms=_PLATFORMS,
        )
        weights = jax.tree.map(
            lambda x: tf.Variable(np.asarray(x), trainable=False), program.weights
        )
        module = tf.Module()
        module.variables_kept = jax.tree.leaves(weights)
        images = tf.TensorSpec((None, *program.sides, 3), tf.uint8, INPUT)
        module.serve = tf.function(
            lambda images: converted(weights, images),
            input_signature=[images],
            autograph=False,
        )
        tf.saved_model.save(module, str(path), signatures=module.serve)
    (path / _ABOUT).parent.mkdir()
    (path / _ABOUT).write_text(json.dumps(program.about, indent=1), encoding="utf-8")


def read(path: Path) -> tuple[Callable[[np.ndarray], Any], dict[str, Any]]:
    import tensorflow as tf

    try:
        about = check(json.loads((path / _ABOUT).read_text(encoding="utf-8")), path)
        module = tf.saved_model.load(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged, or no export ({error})") from None
    serve = module.signatures["serving_default"]

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            found = serve(**{INPUT: tf.constant(images)})
        except tf.errors.InvalidArgumentError as error:
            if "deserialize" not in str(error):
                raise
            # TensorFlow's StableHLO is older than the oldest that this JAX writes.
            raise UserError(
                f"savedmodel: TensorFlow {tf.__version__} cannot read what this JAX "
                "writes; export with an older JAX (0.10.2 and TensorFlow 2.21 go "
                "together), or as stablehlo or onnx"
            ) from None
        return tuple(found[name].numpy() for name in OUTPUTS)

    # A signature does not keep alive what it was loaded from.
    run.module = module  # type: ignore[attr-defined]
    return run, about


def owns(path: Path) -> bool:
    return (path / "saved_model.pb").is_file()
