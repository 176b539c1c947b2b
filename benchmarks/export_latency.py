"""Latency and size of exported models: every format, a label graph folded and not.

python benchmarks/export_latency.py --backbone mobilenetv3_large_100 --size 224

Weights are random: they decide nothing here. Heads and formats take turns, so that what
else the machine does meets all of them alike; what cannot run (a package is missing) is
left out and named.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from mljax import decision, export, predict
from mljax.config import common
from mljax.errors import UserError
from mljax.formats import FORMATS, int8, onnx_file
from mljax.formats.program import INPUT, make
from mljax.label_graph_data import LabelGraph
from mljax.models import BACKBONES, build_model, folded

CLASSES = 80
# The head, and whether its label graph is folded.
VARIANTS = (("linear", True), ("gcn", True), ("gcn", False), ("ml_decoder", True))

Runs = Callable[[np.ndarray], Any]


def build(backbone: str, head: str, size: int, fold: bool) -> tuple[Any, dict]:
    """A model with random weights, and its description."""
    config = common()
    config.model.backbone, config.model.head = backbone, head
    config.data.image_size = size
    names = [str(i) for i in range(CLASSES)]
    rng = np.random.default_rng(0)
    edges, vectors = rng.random((CLASSES, CLASSES)), rng.normal(0, 0.4, (CLASSES, 300))
    graph = LabelGraph(names, edges, vectors, 0.4, []) if head == "gcn" else None
    model = build_model(
        config.model, CLASSES, angular=True, rngs=nnx.Rngs(0), graph=graph
    )
    about = {"config": config.to_dict(), "class_names": names}
    return folded(model) if fold else model, about


def forms(model: Any, about: dict, folder: Path) -> dict[str, tuple[Runs, float]]:
    """Format -> what runs it, and its size in MB."""
    decided = decision.default(CLASSES)
    reference = predict.from_model(model, about, decided)
    program = make(model, about, decided)
    found: dict[str, tuple[Runs, float]] = {"checkpoint": (reference._run, 0.0)}
    for name, form in FORMATS.items():
        path = folder / f"{name}.onnx"
        try:
            form.write(program, path)
            found[name] = form.read(path)[0], export._megabytes(path)
        except UserError as error:
            print(f"{name}: {error}")
    if "onnx" in found:
        path = folder / "onnx.onnx"
        try:
            found["onnx, OpenVINO"] = openvino(path), found["onnx"][1]
        except ImportError as error:
            print(f"OpenVINO: {error}")
        int8.quantise(path)
        found["onnx, int8"] = onnx_file.read(path)[0], export._megabytes(path)
    return found


def openvino(path: Path) -> Runs:
    """In OpenVINO on the CPU; its own choice of precision may be bfloat16."""
    import openvino as ov

    core = ov.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", hint)
    return lambda images: list(compiled({INPUT: images}).values())


def milliseconds(
    run: dict[tuple[str, str], tuple[Runs, float]], images: np.ndarray, repeats: int
) -> dict[tuple[str, str], float]:
    """The median of each, in turns, after one call to warm up."""
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in run}
    for turn in range(repeats + 1):
        for name, (function, _) in run.items():
            start = time.perf_counter()
            found = function(images)
            np.asarray(found[0] if isinstance(found, list | tuple) else found)
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backbone", choices=list(BACKBONES), default="mobilenetv3_large_100")
    add("--size", type=int, default=224, help="pixels")
    add("--batch", type=int, default=16, help="beside batches of one")
    add("--repeats", type=int, default=15)
    args = parser.parse_args()
    pixels = f"{args.size} x {args.size} pixels, {CLASSES} labels"
    print(f"{args.backbone}, {pixels}, median of {args.repeats}")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, args.size, args.size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as place:
        run: dict[tuple[str, str], tuple[Runs, float]] = {}
        for number, (head, fold) in enumerate(VARIANTS):
            kind = head if head != "gcn" else f"gcn, {'' if fold else 'not '}folded"
            folder = Path(place) / str(number)
            folder.mkdir()
            model = build(args.backbone, head, args.size, fold)
            for name, made in forms(*model, folder).items():
                run[kind, name] = made
        few = milliseconds(run, images[:1], args.repeats)
        many = milliseconds(run, images, args.repeats)
    print(
        f"{'head':<20} {'format':<16} {'MB':>7} {'ms, 1':>8} {f'ms, {args.batch}':>8}"
    )
    for (kind, name), (_, size) in run.items():
        shown = f"{size:.1f}" if size else ""
        times = f"{few[kind, name]:>8.1f} {many[kind, name]:>8.1f}"
        print(f"{kind:<20} {name:<16} {shown:>7} {times}")


if __name__ == "__main__":
    main()
