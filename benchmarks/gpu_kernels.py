"""The kernels of a program that XLA compiled for a GPU, read off its text.

Bytes are those that a kernel must read and write if nothing stays in a cache: each of
its operands once (of what it only slices, the slices), and its results.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}

# %name = type operation(operands), attributes; several results are (type, type).
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$")
_NOTHING_TO_DO = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
_NOTHING_TO_DO += ("after-all", "optimization-barrier")


class Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    operands: list[str]
    rest: str  # operands and attributes as they stand there


class Kernel(NamedTuple):
    """A kernel, or a call of cuBLAS or cuDNN.

    kind: "convolution", "matrix product", "reduction", "elementwise" or "other".
    """

    name: str
    kind: str
    read: int  # bytes
    wrote: int
    flops: float  # of convolutions and matrix products
    type: str
    source: str  # where in the traced program it comes from

    @property
    def bytes(self) -> int:
        return self.read + self.wrote


def kernels(program: str) -> list[Kernel]:
    """Those of a compiled program's text, in the order in which they run.

    Raises:
        ValueError: it is no program, or has a loop or a branch: how often that runs
            is not known.
    """
    computations, entry = _computations(program)
    if entry is None:
        raise ValueError("no ENTRY computation: this is no compiled program's text")
    return _kernels_of(computations[entry], computations)


def size(type_: str) -> int:
    """Bytes of all arrays in a type such as (bf16[8,4]{1,0}, f32[])."""
    return sum(
        BYTES.get(kind, 0) * _count(shape)
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", type_)
    )


def _count(shape: str) -> int:
    return math.prod(map(int, shape.split(","))) if shape else 1


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    found: dict[str, list[Instruction]] = {}
    inside, entry = None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            inside = match.group(2)
            found[inside], entry = [], inside if match.group(1) else entry
        elif line == "}":
            inside = None
        elif inside and (match := _INSTRUCTION.match(line)):
            name, type_, operation, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            found[inside].append(Instruction(name, type_, operation, operands, rest))
    return found, entry


def _kernels_of(
    body: list[Instruction], computations: dict[str, list[Instruction]]
) -> list[Kernel]:
    types = {each.name: each.type for each in body}
    found = []
    for each in body:
        if each.operation in ("while", "conditional"):
            raise ValueError(f"{each.name}: how often it runs is not known")
        if each.operation == "call":
            called = _called(each.rest, "to_apply")
            found += _kernels_of(computations[called], computations)
        elif each.operation == "async-start":
            called = _called(each.rest, "calls")
            found += _kernels_of(computations[called], computations)
        elif not each.operation.endswith("-done") and (
            each.operation not in _NOTHING_TO_DO
        ):
            found.append(_kernel(each, types, computations))
    return found


def _called(rest: str, attribute: str) -> str:
    match = re.search(rf"{attribute}=%([\w.\-]+)", rest)
    if not match:
        raise ValueError(f"no {attribute} in {rest[:80]}")
    return match.group(1)


def _kernel(
    each: Instruction,
    types: dict[str, str],
    computations: dict[str, list[Instruction]],
) -> Kernel:
    shapes = [types.get(name, "") for name in each.operands]
    result, read, flops = each.type, sum(map(size, shapes)), 0.0
    kind = "other"
    target = re.search(r'custom_call_target="([^"]*)"', each.rest)
    if each.operation == "fusion":
        inside = computations[_called(each.rest, "calls")]
        read, kind = _read_by(inside, shapes), _kind_of(inside)
        flops = sum(_flops_inside(i, inside) for i in inside)
    elif each.operation == "copy-start":  # its result is a tuple that it also keeps
        result = shapes[0]
    elif each.operation == "custom-call" and target:
        result = re.sub(r", [su]8\[\d*\]\{0\}", "", result)  # cuDNN's own memory
        if "conv" in target.group(1):
            kind = "convolution"
            flops = _convolution_flops(each.rest, shapes, result)
        elif "matmul" in target.group(1) or "gemm" in target.group(1):
            kind, flops = "matrix product", _product_flops(shapes, result)
    source = re.search(r'op_name="([^"]*)"', each.rest)
    where = source.group(1) if source else ""
    return Kernel(each.name, kind, read, size(result), flops, each.type, where)


def _kind_of(inside: list[Instruction]) -> str:
    operations = {each.operation for each in inside}
    if operations & {"dot", "convolution"}:
        return "matrix product" if "dot" in operations else "convolution"
    return "reduction" if "reduce" in operations else "elementwise"


def _read_by(inside: list[Instruction], shapes: list[str]) -> int:
    """Bytes of the operands of a fusion that it looks at."""
    users = defaultdict(list)
    for each in inside:
        for place, name in enumerate(each.operands):
            users[name].append((each, place))

    def part(name: str, whole: int) -> int:
        total = 0
        for user, place in users[name]:
            if user.operation in ("slice", "dynamic-slice", "gather") and not place:
                total += size(user.type)
            elif user.operation in ("bitcast", "convert", "copy", "reshape"):
                total += part(user.name, whole)
            else:
                return whole
        return min(total, whole)

    total = 0
    for each in inside:
        if each.operation == "parameter":
            shape = shapes[int(each.rest.split(")")[0])]
            total += part(each.name, size(shape))
    return total


def _shape(type_: str) -> list[int]:
    """Of the first array in a type."""
    match = re.search(r"\w\[([\d,]*)\]", type_)
    return [int(n) for n in match.group(1).split(",") if n] if match else []


def _convolution_flops(rest: str, operands: list[str], result: str) -> float:
    """2 for each multiply-add: every output of the forward convolution is a sum over
    its filter. In all three of its directions that is the same number.
    """
    first, second, out = _shape(operands[0]), _shape(operands[1]), _shape(result)
    outputs, filters = out, second
    if "convBackwardFilter" in rest:
        outputs, filters = second, out
    elif "convBackwardInput" in rest:
        outputs = first
    labels = re.search(r"dim_labels=\w+_(\w+)->", rest)  # such as b01f_o01i->b01f
    if not labels:
        raise ValueError(f"no dim_labels in {rest[:80]}")
    each = filters[labels.group(1).index("o")]
    return 2.0 * math.prod(outputs) * math.prod(filters) / each


def _flops_inside(each: Instruction, inside: list[Instruction]) -> float:
    """Of an instruction in a fusion; 0 if it is no product and no convolution."""
    if each.operation not in ("dot", "convolution"):
        return 0.0
    types = {other.name: other.type for other in inside}
    operands = [types[name] for name in each.operands[:2]]
    if each.operation == "dot":
        return _product_flops(operands, each.type)
    return _convolution_flops(each.rest, operands, each.type)


def _product_flops(operands: list[str], result: str) -> float:
    """[..., m, k] x [..., k, n] -> [..., m, n], whatever is turned round."""
    left, right, out = (_shape(x) for x in (*operands[:2], result))
    both = math.prod(left) * math.prod(right)
    summed = math.sqrt(both / math.prod(out) / math.prod(out[:-2]))
    return 2.0 * math.prod(out) * summed
