"""The training step beside PyTorch's: same model, batch, loss, SAM, SGD and EMA.

python benchmarks/train_step.py --torch-python torch-env/bin/python

The peer is what a user would pick instead: timm's model in the memory format that is
faster (both are timed), SAM, optimiser and EMA written with torch._foreach; on a GPU
bfloat16 autocast and torch.compile. It lives in an environment of its own:

    python -m venv torch-env
    torch-env/bin/pip install torch==2.13.0 numpy pillow safetensors pyyaml
    torch-env/bin/pip install --no-deps timm==1.0.19 huggingface_hub packaging tqdm

Both start from the same weights and see the same batch, and their losses in the first
step must agree. Then each in turn trains some steps while the other waits. Prints the
medians and their ratio, and writes them to --output as JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER = Path(__file__).with_name("torch_step.py")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch-python", help="python of the peer's environment; without it ours only")
    add("--backbone", default="tf_mobilenetv3_large_minimal_100")
    add("--size", type=int, default=128, help="pixels along a side")
    add("--batch", type=int, default=64)
    add("--classes", type=int, default=36)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=8, help="in a round")
    add("--output", help="JSON file for the numbers")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


class Worker:
    """A process that says what it is, and then its times whenever it is asked."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print as well
                return json.loads(line)
        raise SystemExit("a worker ended; its message is above")

    def times(self, variant: str, steps: int) -> list[float]:
        assert self.process.stdin
        print(json.dumps({"variant": variant, "steps": steps}), file=self.process.stdin)
        self.process.stdin.flush()
        return self.answer()["ms"]


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args, Path(args.worker))
    with tempfile.TemporaryDirectory() as folder:
        shared = [f"--worker={folder}"]
        for name in ("backbone", "size", "batch", "classes", "dtype"):
            shared.append(f"--{name}={getattr(args, name)}")
        workers = {"mljax": Worker([sys.executable, __file__, *shared])}
        if args.torch_python:
            workers["torch"] = Worker([args.torch_python, str(PEER), *shared])
            losses = [worker.about["loss"] for worker in workers.values()]
            if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
                raise SystemExit(f"the first losses differ: {losses}")
        runs = [(w, v) for w in workers for v in workers[w].about["variants"]]
        times: dict[str, list[float]] = {f"{w} {v}".strip(): [] for w, v in runs}
        for _ in range(args.rounds):
            for worker, variant in runs:
                key = f"{worker} {variant}".strip()
                times[key] += workers[worker].times(variant, args.steps)
        for worker in workers.values():
            worker.process.kill()
    report(args, {name: worker.about for name, worker in workers.items()}, times)


def report(
    args: argparse.Namespace, about: dict, times: dict[str, list[float]]
) -> None:
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    print(
        f"{args.backbone} {args.size} px, batch {args.batch}, SAM + EMA, {args.dtype}"
    )
    for name, ms in medians.items():
        rate, least = 1e3 * args.batch / ms, min(times[name])
        print(f"{name:<24} {ms:8.1f} ms (least {least:.1f})  {rate:7.1f} images/s")
    peers = [ms for name, ms in medians.items() if name.startswith("torch")]
    if peers:
        print(f"mljax is {min(peers) / medians['mljax']:.2f} times as fast")
    result = {
        **{k: v for k, v in vars(args).items() if k not in ("worker", "torch_python")},
        "median_ms": medians,
        "least_ms": {name: min(ms) for name, ms in times.items()},
        "about": about,
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
    }
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


def work(args: argparse.Namespace, folder: Path) -> None:
    """Ours: writes weights and batch for the peer, then answers with times."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from mljax import losses, models, optim, step
    from mljax.config import common
    from mljax.data import augment
    from mljax.models import import_torch
    from mljax.models.functional import as_function, split

    config = common()
    config.model.backbone = args.backbone
    config.loss.aam.scale = 17.0
    model = models.build_model(
        config.model,
        args.classes,
        angular=True,
        dtype=jnp.dtype(args.dtype),
        rngs=nnx.Rngs(0),
    )
    draw = np.random.default_rng(0)
    shape = (args.batch, args.size, args.size, 3)
    batch = {
        "image": draw.integers(0, 255, shape, np.uint8),
        "labels": draw.integers(0, 2, (args.batch, args.classes)).astype(np.int8),
    }
    np.savez(folder / "weights.npz", **import_torch.export(model))
    np.savez(folder / "batch.npz", **batch)
    params, stats = split(model)
    optimizer = optim.make_optimizer(config.optim, args.batch, 1000, params)
    state = step.create_state(params, stats, optimizer, use_ema=True)
    apply, loss_fn = as_function(model), losses.make_loss(config.loss)

    @jax.jit
    def first_loss(params, stats, images, labels):
        outputs, _ = apply(params, stats, augment.normalise(images), train=True)
        return loss_fn(outputs, labels)

    loss = float(first_loss(params, stats, batch["image"], batch["labels"]))
    train_step = jax.jit(
        step.make_train_step(
            apply,
            loss_fn,
            optimizer,
            augment.make_augment(),
            reduction="sum",
            seed=0,
            sam_rho=0.05,
            ema_decay=0.9997,
        ),
        donate_argnums=0,
    )
    batch = jax.tree.map(jnp.asarray, batch)
    compiled = train_step.lower(state, batch).compile()
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    device = jax.devices()[0].device_kind
    about = {"loss": loss, "variants": [""], "jax": jax.__version__, "device": device}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        ms = []
        for _ in range(json.loads(line)["steps"]):
            begun = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
            ms.append(1e3 * (time.perf_counter() - begun))
        print(json.dumps({"ms": ms}), flush=True)


if __name__ == "__main__":
    if "--worker" in " ".join(sys.argv):
        sys.path.insert(0, str(ROOT))
        from mljax import memory

        memory.restart_tuned()  # as `python -m mljax.main` does
    main()
