"""Inference beside PyTorch and ONNX Runtime: ms and images/s, batch by batch.

python benchmarks/inference.py --torch-python torch-env/bin/python --output FILE.json

From uint8 pixels to probabilities, both in the host's memory, with normalising,
sigmoid and the transfers. All have the same random weights, and what they say of the
same pictures must agree to 1e-3 of the largest probability (bfloat16: 5e-2), or
nothing is timed.

mljax: the compiled function that `mljax.predict` and `mljax.serve` call, a label
    graph's gate folded away.
torch: timm's model in inference mode, in both memory formats on a CPU; on a GPU (on a
    CPU with --compile) through torch.compile as well. Its environment is that of
    train_step.py.
onnx: what `mljax.export --format onnx` writes, in ONNX Runtime on the CPU, always in
    float32; "not installed" where jax2onnx or onnxruntime are missing.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import (
    TOLERANCE,
    Worker,
    answer,
    as_trained,
    fastest,
    flags,
    in_turns,
    same,
    save,
    summary,
)

PEER = Path(__file__).with_name("torch_inference.py")
MODELS = ("mobilenetv3_large_100", "tf_efficientnetv2_s", "resnet50")
CLASSES = 80


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch-python", help="python of the peer's environment; without it no peer")
    add("--models", nargs="+", default=MODELS)
    add("--head", default="linear", choices=("linear", "gcn", "gat", "ml_decoder"))
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--size", type=int, default=224, help="pixels along a side")
    add("--dtype", default="float32", choices=tuple(TOLERANCE))
    add("--compile", type=int, default=0, help="1: torch.compile on a CPU too")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=12, help="in a round")
    add("--output", help="JSON file for the numbers")
    for name in ("--worker", "--backbone", "--runtime"):
        add(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args, Path(args.worker))
    found = {}
    for model in args.models:
        args.backbone = model
        found[model] = compare(args)
        print(table(model, args, found[model]), flush=True)
    names = ("head", "size", "dtype", "rounds", "steps")
    save(args.output, {**{n: getattr(args, n) for n in names}, "models": found})


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model."""
    names = ("backbone", "head", "batch", "size", "dtype")
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--worker", folder, *flags(args, names)]
        own = [sys.executable, __file__, *shared, "--runtime"]
        workers = {"mljax": Worker([*own, "mljax"])}
        if args.torch_python:
            shared += flags(args, ["compile"])
            workers["torch"] = Worker([args.torch_python, str(PEER), *shared])
        # It computes on the CPU; a second JAX would take the GPU's memory.
        workers["onnx"] = Worker([*own, "onnx"], JAX_PLATFORMS="cpu")
        outputs = {
            f"{name} {variant}".strip(): values
            for name, worker in workers.items()
            for variant, values in worker.about.pop("outputs", {}).items()
        }
        ours, tolerance = outputs.pop("mljax"), TOLERANCE[args.dtype]
        differences = {
            name: same(f"{name} and mljax", values, ours, tolerance)
            for name, values in outputs.items()
        }
        times = in_turns(workers, args.rounds, args.steps, warm=2)
        for worker in workers.values():
            worker.end()
    about = {name: worker.about for name, worker in workers.items()}
    return {**summary(times), "differences": differences, "about": about}


def table(model: str, args: argparse.Namespace, found: dict[str, Any]) -> str:
    lines = [
        f"{model} + {args.head}, {args.size} px, {args.dtype}, {CLASSES} labels; "
        "x: the time of mljax"
    ]
    for count in args.batch:
        lines.append(f"  batch {count}")
        ending, medians = f"batch {count}", {}
        for key, ms in found["median_ms"].items():
            if key.endswith(ending):
                name = key.removesuffix(ending).rstrip(" ,")
                medians[name] = ms
                lines.append(
                    f"    {name:<28} {ms:8.2f} ms (least {found['least_ms'][key]:.2f}) "
                    f"{1e3 * count / ms:8.1f} images/s  {ms / medians['mljax']:5.2f} x"
                )
        if best := fastest(medians, "torch"):
            ratio = best / medians["mljax"]
            lines.append(f"    mljax is {ratio:.2f} times as fast as PyTorch's best")
    if "missing" in found["about"]["onnx"]:
        lines.append(f"    onnx: {found['about']['onnx']['missing']}")
    return "\n".join(lines)


def work(args: argparse.Namespace, folder: Path) -> None:
    """One of ours: "mljax" writes weights and images for the others."""
    about, runs = contestant(args, folder)
    answer(about, runs)


def contestant(args: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """What it says of itself, and "VARIANT, BATCH" -> one call."""
    import jax
    import numpy as np
    import our_step

    config = our_step.settings(args.backbone, args.head, args.size)
    images = our_step.draw_batch(max(args.batch), args.size, CLASSES)["image"]
    if args.runtime == "onnx":
        from mljax.errors import UserError

        try:
            run, about = onnx(config, folder)
        except UserError as error:
            return {"missing": f"not installed ({error})"}, {}
    else:
        model = our_step.build(config, CLASSES, args.dtype)
        our_step.write_weights(folder, model, args.head)
        np.save(folder / "images.npy", images)
        run = our_step.predictor(config, model, CLASSES)
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    outputs = {"": run(images).ravel().tolist()}
    runs = {}
    for count in args.batch:
        part = images[:count]
        run(part)
        runs[f"batch {count}"] = lambda part=part: run(part)
    return {**about, "outputs": outputs}, runs


def onnx(config: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The exported model in ONNX Runtime, on the weights that "mljax" has written.

    Raises UserError if a package is missing.
    """
    import numpy as np
    import our_step

    from mljax import decision
    from mljax.formats import onnx_file
    from mljax.formats.program import make
    from mljax.models import folded, import_torch

    onnx_file.require_all()
    model, path = our_step.build(config, CLASSES), folder / "model.onnx"
    import_torch.load(model, np.load(folder / f"weights-{config.model.head}.npz"))
    about = our_step.described(config, CLASSES)
    onnx_file.write(make(folded(model), about, decision.default(CLASSES)), path)
    run, _ = onnx_file.read(path)
    version = onnx_file.require("onnxruntime").__version__
    return lambda images: run(images)[0], {"onnxruntime": version}


if __name__ == "__main__":
    if "--worker" in sys.argv:
        as_trained(restart="onnx" not in sys.argv)
    main()
