"""Weights of 8 bits for an ONNX file: a quarter of its size.

Only weights: what they are multiplied with stays float32, so that no images are needed
to choose ranges and little is lost. Each output channel has a scale of its own,
max |w| / 127 (Krishnamoorthi 2018, arXiv 1806.08342, section 2.1), and
DequantizeLinear gives the weight back where it is used: ONNX Runtime, OpenVINO and
TensorRT all know this form.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mljax.formats.onnx_file import require

_SMALLEST = 1024  # numbers; smaller arrays are not worth a scale
# Input that holds the weight, and the axis of its output channels.
_WEIGHTS = {"Conv": (1, 0), "MatMul": (1, 1), "Gemm": (1, 1)}


def quantise(path: Path) -> int:
    """Rewrites the file; returns how many arrays it now holds in 8 bits."""
    onnx = require("onnx")
    model = onnx.load(str(path))
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    axes = {
        name: axis
        for name, axis in _axes(graph).items()
        if name in stored and _is_large(stored[name], onnx)
    }
    nodes = []
    for name, axis in axes.items():
        weight = onnx.numpy_helper.to_array(stored[name])
        others = tuple(i for i in range(weight.ndim) if i != axis)
        largest = np.abs(weight).max(others, keepdims=True)
        scale = np.where(largest > 0, largest, 1).astype(np.float32) / 127
        rounded = np.rint(weight / scale).astype(np.int8)
        graph.initializer.remove(stored[name])
        graph.initializer.extend(
            [
                onnx.numpy_helper.from_array(rounded, f"{name}.int8"),
                onnx.numpy_helper.from_array(scale.ravel(), f"{name}.scale"),
            ]
        )
        inputs = [f"{name}.int8", f"{name}.scale"]
        nodes.append(
            onnx.helper.make_node("DequantizeLinear", inputs, [name], name, axis=axis)
        )
    for node in reversed(nodes):
        graph.node.insert(0, node)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return len(nodes)


def _axes(graph: Any) -> dict[str, int]:
    """Name -> axis of the output channels, of the arrays that are only weights."""
    found: dict[str, int] = {}
    refused = set()
    for node in graph.node:
        place, axis = _WEIGHTS.get(node.op_type, (-1, -1))
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if transposed else axis
        for i, name in enumerate(node.input):
            if i != place or found.get(name, axis) != axis:
                refused.add(name)
            else:
                found[name] = axis
    return {name: axis for name, axis in found.items() if name not in refused}


def _is_large(tensor: Any, onnx: Any) -> bool:
    is_float = tensor.data_type == onnx.TensorProto.FLOAT
    return is_float and len(tensor.dims) >= 2 and np.prod(tensor.dims) >= _SMALLEST
