"""What a training step asks of a GPU, read off the program that XLA compiles for it.

python benchmarks/gpu_program.py [--backbone NAME ...] [--size 448] [--batch 32]

Compiles the step (SAM, SGD, EMA) and runs nothing. On a machine without a GPU it is the
program for an H200, see gpu_topology.py; on one that has a GPU, the program for that.

GFLOP are those of convolutions and matrix products. GB are read and written by all
kernels if nothing stays in a cache between them. The least time is the sum over the
kernels of what arithmetic or memory takes, whichever is longer, at the maker's figures:
a bound that no step can beat unless it is another program. Share of peak is what the
GFLOP would be of the peak in that time. Small kernels move less than 4 MB: they take
the few microseconds that any kernel takes. --list names those that move most.
"""

import argparse
import collections
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BACKBONES = ("mobilenetv3_large_100", "tf_efficientnetv2_s", "tresnet_v2_l")
# Bytes a second of a device's memory, as its maker gives them; as `speed.PEAKS`.
BANDWIDTH = {
    "NVIDIA A100": 2.039e12,
    "NVIDIA A100-PCIE-40GB": 1.555e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H100 PCIe": 2e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA L4": 0.3e12,
    "NVIDIA L40": 0.864e12,
    "NVIDIA V100": 0.9e12,
    "Tesla V100": 0.9e12,
}
SMALL = 4e6  # bytes
# Of no interest in the JSON file.
HIDDEN = ("list", "output")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backbone", nargs="+", default=BACKBONES)
    add("--head", default="linear")
    add("--size", type=int, default=448, help="pixels along a side")
    add("--batch", type=int, default=32)
    add("--classes", type=int, default=80)
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--list", type=int, default=0, metavar="N", help="the N that move most")
    add("--output", help="JSON file for the numbers")
    return parser.parse_args()


def find_device() -> Any:
    """The GPU of this machine, or one that is not here."""
    # Without asking JAX, which could not be told anything any more.
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        import gpu_topology

        return gpu_topology.device()
    import jax

    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        raise SystemExit(
            "this machine has a GPU that JAX does not see: pip install 'jax[cuda12]'"
        ) from error


def compiled(args: argparse.Namespace, backbone: str, device: Any) -> Any:
    from unittest import mock

    import jax
    import our_step

    config = our_step.settings(backbone, args.head, args.size)
    model = our_step.build(config, args.classes, args.dtype)
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        state, step = our_step.prepared(config, model, args.batch)
        batch = our_step.batch_shapes(args.batch, args.size, args.classes)
        place = jax.sharding.SingleDeviceSharding(device)
        state, batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            (state, batch),
        )
        return step.lower(state, batch).compile()


def measure(program: Any, peak: float, bandwidth: float) -> tuple[dict, list]:
    """The row of one program, and its kernels."""
    import gpu_kernels

    found = gpu_kernels.kernels(program.as_text())
    flops, moved = sum(k.flops for k in found), sum(k.bytes for k in found)
    least = sum(max(k.flops / peak, k.bytes / bandwidth) for k in found)
    by_kind = collections.Counter[str]()
    for kernel in found:
        by_kind[kernel.kind] += kernel.bytes
    memory = program.memory_analysis()
    row = {
        "gflop": flops / 1e9,
        "gb": moved / 1e9,
        "kernels": len(found),
        "small_kernels": sum(k.bytes < SMALL for k in found),
        "arithmetic_ms": 1e3 * flops / peak,
        "memory_ms": 1e3 * moved / bandwidth,
        "least_ms": 1e3 * least,
        "share_of_peak": flops / peak / least,
        "peak_memory_gb": memory.peak_memory_in_bytes / 1e9,
        "gb_by_kind": {kind: n / 1e9 for kind, n in by_kind.most_common()},
    }
    return row, found


def main() -> None:
    args = arguments()
    device = find_device()
    from side_by_side import save

    from mljax import speed
    from mljax.errors import UserError

    kind = device.device_kind
    peak = speed.peak_of(device)
    rate = BANDWIDTH.get(speed.longest_prefix(kind, BANDWIDTH), 0.0)
    if not (peak and rate):
        where = "BANDWIDTH in this file" if peak else "PEAKS in mljax/speed.py"
        raise SystemExit(f"{kind}: its speed is not known; add it to {where}")
    print(
        f"{kind}: {peak / 1e12:.0f} TFLOP/s, {rate / 1e12:.1f} TB/s; {args.size} px, "
        f"batch {args.batch}, SAM + EMA, {args.dtype}\n"
        f"{'backbone':<24}{'GFLOP':>8}{'GB':>8}{'kernels':>9}{'small':>7}"
        f"{'arithmetic':>12}{'memory':>9}{'least ms':>10}{'of peak':>9}{'peak GB':>9}"
    )
    rows = {}
    for backbone in args.backbone:
        try:
            row, found = measure(compiled(args, backbone, device), peak, rate)
        except (UserError, ValueError) as error:
            raise SystemExit(f"{backbone}: {error}") from error
        rows[backbone] = row
        print(
            f"{backbone:<24}{row['gflop']:8.0f}{row['gb']:8.1f}{row['kernels']:9}"
            f"{row['small_kernels']:7}{row['arithmetic_ms']:12.1f}"
            f"{row['memory_ms']:9.1f}{row['least_ms']:10.1f}"
            f"{100 * row['share_of_peak']:8.0f}%{row['peak_memory_gb']:9.2f}"
        )
        shares = (f"{kind} {gb:.1f}" for kind, gb in row["gb_by_kind"].items())
        print("    GB: " + ", ".join(shares), flush=True)
        for kernel in sorted(found, key=lambda k: -k.bytes)[: args.list]:
            print(
                f"    {kernel.bytes / 1e6:8.1f} MB  {kernel.name}  {kernel.type[:70]}"
                f"  {kernel.source[-60:]}"
            )
    settings = {k: v for k, v in vars(args).items() if k not in HIDDEN}
    save(args.output, {**settings, "device": kind, "rows": rows})


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
