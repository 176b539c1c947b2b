"""The training step beside PyTorch's: same model, batch, loss, SAM, SGD and EMA.

python benchmarks/train_step.py --torch-python torch-env/bin/python

The peer is what a user would pick instead: timm's model in the memory format that is
faster (both are timed), SAM, optimiser and EMA written with torch._foreach; on a GPU
bfloat16 autocast and torch.compile. On a CPU it is timed twice: as it comes, and with
the allocator settings that mljax gives itself. It lives in an environment of its own:

    python -m venv torch-env
    torch-env/bin/pip install torch==2.13.0 numpy pillow safetensors pyyaml
    torch-env/bin/pip install --no-deps timm==1.0.19 huggingface_hub packaging tqdm

Both start from the same weights and see the same batch, and their losses in the first
step must agree. Then each in turn trains some steps while the other waits. Prints the
medians and their ratio, on a GPU also the memory that each used and the share of its
bfloat16 peak, and writes them to --output as JSON. The FLOPs of a step are those that
XLA counts in mljax's, all operations included, for both.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from side_by_side import (
    TOLERANCE,
    Worker,
    answer,
    as_trained,
    fastest,
    flags,
    in_turns,
    our_allocator,
    same,
    save,
    summary,
)

PEER = Path(__file__).with_name("torch_step.py")
TUNED = "torch, our allocator"
# Of no interest in the JSON file.
HIDDEN = ("worker", "torch_python", "output")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch-python", help="python of the peer's environment; without it ours only")
    add("--backbone", default="tf_mobilenetv3_large_minimal_100")
    add("--size", type=int, default=128, help="pixels along a side")
    add("--batch", type=int, default=64)
    add("--classes", type=int, default=36)
    add("--dtype", default="float32", choices=tuple(TOLERANCE))
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=8, help="in a round")
    add("--output", help="JSON file for the numbers")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args, Path(args.worker))
    with tempfile.TemporaryDirectory() as folder:
        names = ("backbone", "size", "batch", "classes", "dtype")
        shared = ["--worker", folder, *flags(args, names)]
        # By default JAX takes three quarters of a GPU's memory before it needs them.
        room = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        workers = {"mljax": Worker([sys.executable, __file__, *shared], **room)}
        if args.torch_python:
            command = [args.torch_python, str(PEER), *shared]
            workers["torch"] = Worker(command)
            if tuned := our_allocator():
                workers[TUNED] = Worker(command, **tuned)
            losses = [worker.about["loss"] for worker in workers.values()]
            same("the first losses", *losses[:2], TOLERANCE[args.dtype])
        times = in_turns(workers, args.rounds, args.steps)
        for worker in workers.values():
            worker.end()
    report(args, {name: worker.about for name, worker in workers.items()}, times)


def report(
    args: argparse.Namespace, about: dict, times: dict[str, list[float]]
) -> None:
    found = summary(times)
    print(
        f"{args.backbone} {args.size} px, batch {args.batch}, SAM + EMA, {args.dtype}"
    )
    for name, ms in found["median_ms"].items():
        rate, least = 1e3 * args.batch / ms, found["least_ms"][name]
        line = f"{name:<36} {ms:8.1f} ms (least {least:.1f})  {rate:7.1f} images/s"
        if peak := about["mljax"].get("peak_tflops"):
            teraflops = about["mljax"]["gflop"] / ms
            line += f"  {100 * teraflops / peak:.0f} % of {peak:.0f} TFLOP/s"
        print(line)
    for name in about:
        rival = fastest(found["median_ms"], f"{name} ")
        if rival and name != "mljax":
            times = rival / found["median_ms"]["mljax"]
            print(f"mljax is {times:.2f} times as fast as {name}")
        if gb := about[name].get("peak_memory_gb"):
            print(f"{name}: {gb:.1f} GB of the device's memory at most")
    settings = {k: v for k, v in vars(args).items() if k not in HIDDEN}
    save(args.output, {**settings, **found, "about": about})


def work(args: argparse.Namespace, folder: Path) -> None:
    """Ours: writes weights and batch for the peer, then answers with times."""
    import jax
    import numpy as np
    import our_step

    config = our_step.settings(args.backbone, size=args.size)
    model = our_step.build(config, args.classes, args.dtype)
    batch = our_step.draw_batch(args.batch, args.size, args.classes)
    our_step.write_weights(folder, model, "linear")
    np.savez(folder / "batch.npz", **batch)
    loss = our_step.loss(config, model, batch)
    training = our_step.Training(config, model, batch)
    for _ in range(2):
        training.step()
    about = {"loss": loss, "jax": jax.__version__, **training.facts()}
    answer(about, {"": training.step})


if __name__ == "__main__":
    if "--worker" in sys.argv:
        as_trained()
    main()
