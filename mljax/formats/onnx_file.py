"""ONNX, for ONNX Runtime, OpenVINO and TensorRT: one file.

The description is JSON in its metadata, under "mljax".
"""

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mljax.errors import PIP, UserError
from mljax.formats.program import INPUT, OUTPUTS, Program, check

OPSET = 18  # known to ONNX Runtime 1.14, OpenVINO 2023 and TensorRT 8.6, and all since
_ABOUT = "mljax"
INSTALL = f"{PIP} '.[export]' && {PIP} --no-deps jax2onnx==0.17.1"


def write(program: Program, path: Path) -> None:
    import jax

    from mljax.formats import onnx_tidy
    from mljax.models import cpu

    onnx, jax2onnx = require_all()
    images = jax.ShapeDtypeStruct(("batch", *program.sides, 3), np.uint8)
    with cpu.plain_forms(), _silent():
        made = jax2onnx.to_onnx(
            lambda images: program.function(program.weights, images),
            [images],
            model_name="mljax",
            opset=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
        )
    onnx_tidy.tidy(made)
    made = onnx_tidy.without_transposes(made)
    onnx_tidy.share_constants(made)
    describe(made, program.about)
    onnx.checker.check_model(made)
    onnx.save(made, str(path))


def describe(model: Any, about: dict[str, Any]) -> None:
    """Writes the description into an ONNX model."""
    kept = [entry for entry in model.metadata_props if entry.key != _ABOUT]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=_ABOUT, value=json.dumps(about))


def read(path: Path) -> tuple[Callable[[np.ndarray], Any], dict[str, Any]]:
    """Runs it in ONNX Runtime, on the CPU."""
    ort = require("onnxruntime", f"{PIP} onnxruntime")  # reading needs no more
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns of shapes that it then infers itself
    # Weights of 8 bits are expanded once, when the file is read, not at every call.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its errors have no common type
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: ONNX Runtime cannot read it ({reason})") from None
    found = session.get_modelmeta().custom_metadata_map
    about = check(json.loads(found.get(_ABOUT, "null")), path)
    return lambda images: session.run(list(OUTPUTS), {INPUT: images}), about


def owns(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".onnx"


def may_replace(path: Path) -> bool:
    try:
        model = require("onnx").load(path, load_external_data=False)
    except UserError:
        raise
    except Exception:  # its errors have no common type
        return False
    return any(entry.key == _ABOUT for entry in model.metadata_props)


def require_all() -> tuple[ModuleType, ModuleType]:
    """onnx and jax2onnx; and onnxruntime is there too. Raises as `require`."""
    require("onnxruntime")
    with _silent():
        return require("onnx"), require("jax2onnx")


def require(name: str, install: str = INSTALL) -> ModuleType:
    """A package that only ONNX needs. Raises UserError, with how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error}: ONNX needs more packages: {install}") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """jax2onnx and onnx_ir tell of what they then do without."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
