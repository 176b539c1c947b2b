"""Runs `python -m mljax.main` as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).resolve().parents[1]

# A few seconds of training. The backbone is the quickest to compile.
BACKBONE = "--config.model.backbone=vit_tiny_patch16_224"
TINY = [
    BACKBONE,
    "--config=configs/shapes.py:debug",
    "--config.batch_size=16",
    "--config.data.num_train=64",
    "--config.data.num_val=32",
]


def command(workdir: Path, *arguments: str) -> list[str]:
    main = [sys.executable, "-m", "mljax.main", f"--workdir={workdir}"]
    return [*main, *arguments]


def environment(cache: Path) -> dict[str, str]:
    """One device, and compiled programs shared between the runs of a test."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return env | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def run(
    workdir: Path, cache: Path, *arguments: str, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *command(workdir, *arguments)],
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=900,
    )


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def same_results(one: Path, other: Path) -> None:
    """Raises AssertionError unless two work directories ended with the same bits."""
    for name in ("metrics.jsonl", "metrics.json", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for folder in ("checkpoints", "best"):
        steps = [max(int(p.name) for p in (w / folder).iterdir()) for w in (one, other)]
        assert steps[0] == steps[1], folder
        trees = [load(w / folder / str(steps[0])) for w in (one, other)]
        flat = [_flatten(tree) for tree in trees]
        assert flat[0].keys() == flat[1].keys()
        for name, value in flat[0].items():
            assert value.tobytes() == flat[1][name].tobytes(), f"{folder}: {name}"


def load(step: Path):
    """All arrays of a saved step, on the first device, by whatever it was written."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        ocp.metadata(step, checkpointable_name="state").metadata,
    )
    return ocp.load(step, wanted, checkpointable_name="state")


def _flatten(tree, prefix="") -> dict[str, np.ndarray]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {} if tree is None else {prefix: np.asarray(tree)}
    flat: dict[str, np.ndarray] = {}
    for name, value in items:
        flat |= _flatten(value, f"{prefix}/{name}")
    return flat
