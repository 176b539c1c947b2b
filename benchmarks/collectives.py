"""Bytes that a training step sends between devices, and bytes it keeps on each.

python benchmarks/collectives.py [--devices 8 64 256] [--backbone NAME] [--head NAME]
python benchmarks/collectives.py --topology v5e:4x4 --fsdp 1 4 [--size 448 --batch 32]

Compiles the training step (SAM, EMA, as in `mljax.train`) for so many simulated CPU
devices, or for TPUs that need not be there (pip install libtpu; minutes), runs nothing,
and reads the collective operations off the compiled program.
A row is a layout data x fsdp. MB sent are those a device sends with ring algorithms:
2 (n - 1) / n of the bytes of an all-reduce, (n - 1) / n of those of an all-gather
(counted whole), n the devices that take part.

The least possible, with these two operations: in each pass over the batch (SAM has two)
every gradient is all-reduced once, and for each BatchNorm the sums that its mean and
its variance need (what the gradient through them needs are the gradients of its weight
and bias); and every parameter that is split over fsdp is gathered once in the step: the
first gradient is whole on each device, so that what SAM moves is computed there. With
reduce-scatter less would be sent under fsdp.

MB of state: parameters, optimiser and averages, as arguments of the compiled program.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


# How an array lies in a TPU's memory, behind its shape: f32[16]{0:T(128)S(1)}.
_LAYOUT = re.compile(r"(\w\[[\d,]*\])\{[^{}]*\}")

SHARED = ("topology", "backbone", "head", "size", "batch", "dtype")


def collectives(program: str, devices: int) -> list[tuple[str, int, int]]:
    """(kind, bytes of the result, devices in a group) of each in an HLO text."""
    found, channels = [], set()
    # %name = type operation(operands), attributes; of several results: (type, type).
    result = r"^\s*(?:ROOT )?%?\S+ = (\([^)]*\)|\S+)"
    pattern = re.compile(rf"{result} ({'|'.join(KINDS)})(?:-start)?\((.*)")
    for line in program.splitlines():
        line = _LAYOUT.sub(r"\1", line)
        if not (match := pattern.match(line)):
            continue
        result, kind, rest = match.groups()
        # A TPU's program repeats an operation where it goes on beside others.
        if channel := re.search(r"channel_id=\d+", rest):
            if channel.group() in channels:
                continue
            channels.add(channel.group())
        size = 0
        for kind_of_number, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size += BYTES[kind_of_number] * math.prod(
                map(int, shape.split(",") if shape else [])
            )
        found.append((kind, size, _group(rest, devices)))
    return found


def _group(text: str, devices: int) -> int:
    """Devices in a group; XLA writes groups in one of three ways."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\](.*)", text):
        sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", match.group(1))}
        # The axes along which it works; 'axis':(before)size is a part of one.
        axes = re.search(r"\{('.*?)\}", match.group(2))
        named = axes.group(1) if axes else ""
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named)
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match.group(1))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(match.group(1).split(","))
    return devices


def sent(kind: str, size: float, group: int) -> float:
    """Bytes that a device sends for one operation, by a ring."""
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * share * size
    if kind == "reduce-scatter":  # its result is one part
        return share * size * group
    return size if kind == "collective-permute" else share * size


def least(state: Any, fsdp: int, devices: int, passes: int, is_split: Any) -> float:
    """Bytes that a device must send in a step; see the top of this file."""
    import jax

    params = jax.tree.leaves(state.params)
    channels = jax.tree.leaves(state.batch_stats)  # a mean and a variance for each
    reduced = sum(4 * x.size for x in [*params, *channels])
    gathered = sum(4 * x.size for x in params if is_split(x))
    in_a_pass = sent("all-reduce", reduced, devices)
    return passes * in_a_pass + sent("all-gather", gathered, fsdp)


def measure(config: Any, devices: int, fsdp: int) -> dict[str, Any]:
    """The figures of one layout; the process has that many devices."""
    import jax

    from mljax import sharding, train

    config.mesh.data, config.mesh.fsdp = devices // fsdp, fsdp
    made = train.setup(config)
    size = config.data.image_size
    rows = sharding.batch_sharding(made.run.mesh)
    batch = {
        "image": (config.batch_size, size, size, 3),
        "labels": (config.batch_size, len(made.run.class_names)),
    }
    kinds = {"image": "uint8", "labels": "int8"}
    arrays = {
        name: jax.ShapeDtypeStruct(shape, kinds[name], sharding=rows)
        for name, shape in batch.items()
    }
    compiled = made.step_at(1).lower(made.state, arrays, made.seed).compile()
    found = collectives(compiled.as_text(), devices)
    wire = sum(sent(*each) for each in found)
    passes = 2 if config.sam.rho else 1
    split = least(
        made.state, fsdp, devices, passes, lambda x: not x.sharding.is_fully_replicated
    )
    analysis = compiled.memory_analysis()
    batch_bytes = sum(math.prod(s) for s in batch.values()) / devices
    return {
        "layout": f"{devices // fsdp} x {fsdp}",
        "devices": devices,
        "operations": {k: sum(f[0] == k for f in found) for k in KINDS},
        "sent_mb": wire / 1e6,
        "least_mb": split / 1e6,
        "ratio": wire / split if split else 1.0,
        "state_mb": (analysis.argument_size_in_bytes - batch_bytes) / 1e6,
        "temporary_mb": analysis.temp_size_in_bytes / 1e6,
        "gflop": compiled.cost_analysis()["flops"] / 1e9,
    }


def make_config(args: argparse.Namespace, devices: int) -> Any:
    from mljax import config as configs

    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone, config.model.head = args.backbone, args.head
    config.data.image_size, config.dtype = args.size, args.dtype
    config.batch_size = config.eval.batch_size = args.batch * devices
    config.data.num_train = config.data.num_val = args.batch * devices
    config.sam.rho = 0.05
    return config


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--devices", type=int, nargs="+", default=[8, 64, 256])
    add("--topology", help="of TPUs, as v5e:4x4, instead of simulated CPU devices")
    add("--fsdp", type=int, nargs="+", default=[1, 8])
    add("--backbone", default="mobilenetv3_large_100")
    add("--head", default="linear")
    add("--size", type=int, default=64, help="pixels along a side")
    add("--batch", type=int, default=2, help="images on a device")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def one(args: argparse.Namespace) -> dict[str, Any]:
    """A row, in a process of its own: the number of devices is fixed in one."""
    (fsdp,) = args.fsdp
    if not args.topology:
        (devices,) = args.devices
        return measure(make_config(args, devices), devices, fsdp)
    import tpu_topology

    os.environ |= tpu_topology.ENVIRONMENT
    devices = len(tpu_topology.devices(args.topology))
    if devices % fsdp:
        raise SystemExit(f"--fsdp {fsdp} does not divide {devices} devices")
    with tpu_topology.compiling_for(args.topology):
        return measure(make_config(args, devices), devices, fsdp)


def main() -> None:
    from mljax import main as program

    program.quiet()
    args = arguments()
    if args.one:
        print(json.dumps(one(args)))
        return
    print(f"{args.backbone} + {args.head}, {args.size} px, SAM, {args.dtype}")
    print(
        "| data x fsdp | all-reduce | all-gather | reduce-scatter | other | MB sent "
        "| least | ratio | MB of state | MB of temporaries | GFLOP |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    shared = [f"--{n}={getattr(args, n)}" for n in SHARED if getattr(args, n)]
    for devices in [0] if args.topology else args.devices:
        for fsdp in args.fsdp:
            if devices % fsdp:
                continue
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(max(devices, 1)),
                # Nothing is run: the machine code need not be good.
                "XLA_FLAGS": "--xla_backend_optimization_level=0 "
                "--xla_llvm_disable_expensive_passes=true",
            }
            command = [sys.executable, __file__, "--one", f"--devices={devices}"]
            command += [f"--fsdp={fsdp}", *shared]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.returncode)
            row = json.loads(done.stdout.splitlines()[-1])
            count = row["operations"]
            other = sum(count[k] for k in KINDS[3:])
            print(
                f"| {row['layout']} | {count['all-reduce']} | {count['all-gather']} | "
                f"{count['reduce-scatter']} | {other} | {row['sent_mb']:.2f} | "
                f"{row['least_mb']:.2f} | {row['ratio']:.3f} | {row['state_mb']:.2f} | "
                f"{row['temporary_mb']:.1f} | {row['gflop']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
