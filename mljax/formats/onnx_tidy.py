"""An ONNX graph as its runtimes like it: constants computed, convolutions whole.

What comes from JAX computes with its weights at every call (transposes them, cuts them
in parts), and has the scale and the bias of a BatchNorm in nodes of their own.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mljax.formats.onnx_file import require

_LARGEST_GROWTH = 100_000  # numbers that a computed constant may add to the file
_NHWC = [0, 2, 3, 1]


class _Graph:
    """Lookups in a graph that is being changed."""

    def __init__(self, model: Any, onnx: Any):
        self.model, self.graph, self.onnx = model, model.graph, onnx
        to_array = onnx.numpy_helper.to_array
        self.constants = {t.name: to_array(t) for t in self.graph.initializer}
        self.outputs = {output.name for output in self.graph.output}

    def uses(self) -> dict[str, list[Any]]:
        """Name -> the nodes that read it."""
        found: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def keep(self, nodes: list[Any]) -> None:
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def write_constants(self) -> None:
        """Those that something reads."""
        read = self.uses().keys() | self.outputs
        from_array = self.onnx.numpy_helper.from_array
        arrays = {k: v for k, v in self.constants.items() if k in read}
        del self.graph.initializer[:]
        self.graph.initializer.extend(
            from_array(np.ascontiguousarray(v), k) for k, v in arrays.items()
        )


def tidy(model: Any) -> None:
    """Changes an ONNX model; it stays the same function."""
    graph = _Graph(model, require("onnx"))
    _compute_constants(graph)
    _name_products(graph)
    _merge_into_convolutions(graph)
    graph.write_constants()
    names = {node.output[0] for node in graph.graph.node}
    kept = [v for v in graph.graph.value_info if v.name in names]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(kept)


def share_constants(model: Any) -> None:
    """Keeps equal constants once: a picture and its mirror image meet the same ones."""
    graph = _Graph(model, require("onnx"))
    first: dict[Any, str] = {}
    same = {
        name: first.setdefault((value.dtype.str, value.shape, value.tobytes()), name)
        for name, value in graph.constants.items()
    }
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
    graph.write_constants()


def without_transposes(model: Any) -> Any:
    """The same function with maps as channels first, the way that ONNX convolves.

    JAX's maps have the channels last, so that every convolution came between two
    transposes. ONNX Runtime removes them among its "basic" optimisations, which stay
    within standard operators; OpenVINO is twice as fast without them.
    """
    onnx, ort = require("onnx"), require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        made = onnx.load(options.optimized_model_filepath)
    used = {node.domain for node in made.graph.node}
    imports = [i for i in made.opset_import if i.domain in used]
    del made.opset_import[:]
    made.opset_import.extend(imports)
    return made


def _compute_constants(graph: _Graph) -> None:
    kept = []
    for node in graph.graph.node:
        inputs = [name for name in node.input if name]
        known = inputs and all(name in graph.constants for name in inputs)
        is_plain = not any(a.HasField("g") for a in node.attribute)
        outputs = _run(graph, node) if known and is_plain else None
        if outputs is None or graph.outputs & set(node.output):
            kept.append(node)
        else:
            graph.constants.update(zip(node.output, outputs, strict=True))
    graph.keep(kept)


def _run(graph: _Graph, node: Any) -> list[np.ndarray] | None:
    """What a node of constants gives; None where that would take too much room."""
    from onnx.reference import ReferenceEvaluator

    helper = graph.onnx.helper
    feed = {name: graph.constants[name] for name in node.input if name}
    empty = helper.make_empty_tensor_value_info
    one = helper.make_graph(
        [node], "one", [empty(n) for n in feed], [empty(n) for n in node.output]
    )
    made = helper.make_model(one, opset_imports=graph.model.opset_import)
    outputs = [np.asarray(x) for x in ReferenceEvaluator(made).run(None, feed)]
    growth = sum(x.size for x in outputs) - sum(x.size for x in feed.values())
    return outputs if growth <= _LARGEST_GROWTH else None


def _name_products(graph: _Graph) -> None:
    """Einsum "abc,cd->abd" is MatMul, which every runtime has a fast form of."""
    for node in graph.graph.node:
        if node.op_type == "Einsum" and len(node.input) == 2:
            equation = node.attribute[0].s.decode().replace(" ", "")
            if re.fullmatch(r"(\w+)(\w),\2(\w)->\1\3", equation):
                node.op_type = "MatMul"
                del node.attribute[:]


def _merge_into_convolutions(graph: _Graph) -> None:
    """Conv, Transpose to NHWC, then products and sums with a number for each channel.

    They go into the weights and the bias of the convolution.
    """
    uses = graph.uses()
    for conv in graph.graph.node:
        if conv.op_type != "Conv" or conv.input[1] not in graph.constants:
            continue
        turned = _only_reader(graph, uses, conv)
        if turned is None or turned.op_type != "Transpose" or _perm(turned) != _NHWC:
            continue
        weight = graph.constants[conv.input[1]]
        has_bias = len(conv.input) > 2 and conv.input[2] in graph.constants
        if len(conv.input) > 2 and not has_bias:
            continue
        zeros = np.zeros(len(weight), weight.dtype)
        bias = graph.constants[conv.input[2]] if has_bias else zeros
        merged = False
        while (node := _only_reader(graph, uses, turned)) is not None:
            number = _per_channel(graph, node, turned.output[0], len(weight))
            if number is None:
                break
            if node.op_type == "Mul":
                weight = weight * number[:, None, None, None]
                bias = bias * number
            else:
                bias = bias + number
            turned.output[0] = node.output[0]
            node.Clear()  # it stays in its place until the end
            merged = True
        if merged:
            names = [f"{conv.output[0]}.weight", f"{conv.output[0]}.bias"]
            graph.constants.update(zip(names, (weight, bias), strict=True))
            del conv.input[1:]
            conv.input.extend(names)
    graph.keep([node for node in graph.graph.node if node.op_type])


def _only_reader(graph: _Graph, uses: dict[str, list[Any]], node: Any) -> Any | None:
    name = node.output[0]
    readers = uses.get(name, [])
    return readers[0] if len(readers) == 1 and name not in graph.outputs else None


def _perm(node: Any) -> list[int]:
    return [i for a in node.attribute if a.name == "perm" for i in a.ints]


def _per_channel(
    graph: _Graph, node: Any, value: str, channels: int
) -> np.ndarray | None:
    """[channels]: what a Mul or Add does to each channel of the NHWC map `value`."""
    if node.op_type not in ("Mul", "Add"):
        return None
    others = [name for name in node.input if name != value]
    if len(others) != 1 or others[0] not in graph.constants:
        return None
    array = graph.constants[others[0]]
    in_last = array.ndim == 0 or array.shape[-1] == array.size
    if not in_last or array.size not in (1, channels) or array.ndim > 4:
        return None
    return np.broadcast_to(array.reshape(-1), channels)
