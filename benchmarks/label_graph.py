"""What a head costs in training and in use: a label graph, ML-Decoder, none.

python benchmarks/label_graph.py --torch-python torch-env/bin/python --output FILE.json

For each number of labels and each head, ours and PyTorch's in turns:

    step       a whole training step (SAM, EMA, AAM), as train_step.py has it
    alone      forward and backward of the head on a map that stays the same: a step
               with SAM has two of them
    inference  of 8 images, from pixels to probabilities, the gate of a graph folded

with what each has more than the linear head. Beside them parameters of the head (10^6),
multiply-adds of its forward pass in a step (10^9) and at inference an image (10^6).

The peer's heads are in torch_heads.py; its memory format is channels_last. Without
dropout the losses of both must agree to 1e-3: those of the heads on the same map, and,
where a head has no dropout, those of the first step.
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
    flags,
    in_turns,
    same,
    save,
    summary,
)

PEER = Path(__file__).with_name("torch_label_graph.py")
HEADS = ("linear", "gcn", "gat", "ml_decoder")
# part -> (how many for each whole step, how many before them are not timed)
PARTS = {"step": (1, 0), "alone": (4, 1), "inference": (4, 2)}
IMAGES = 8  # at inference


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch-python", help="python of the peer's environment; without it ours only")
    add("--backbone", default="tf_efficientnetv2_s")
    add("--heads", nargs="+", default=HEADS, choices=HEADS)
    add("--labels", nargs="+", type=int, default=[20, 80, 500, 5000])
    add("--parts", nargs="+", default=tuple(PARTS), choices=tuple(PARTS))
    add("--size", type=int, default=224, help="pixels along a side")
    add("--batch", type=int, default=16)
    add("--dtype", default="float32", choices=tuple(TOLERANCE))
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=3, help="whole steps in a round")
    add("--output", help="JSON file for the numbers")
    for name in ("--worker", "--classes"):
        add(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        about, runs = contestant(args, Path(args.worker))
        return answer(about, runs)
    print(
        f"{args.backbone}, {args.size} px, batch {args.batch}, {args.dtype}; "
        "ms: medians (more than linear)"
    )
    found = {}
    for count in args.labels:
        args.classes = count
        found[str(count)] = compare(args)
        print(table(args, found[str(count)]), flush=True)
    names = ("backbone", "size", "batch", "dtype", "rounds", "steps")
    save(args.output, {**{n: getattr(args, n) for n in names}, "labels": found})


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The figures for one number of labels."""
    names = ("backbone", "heads", "classes", "parts", "size", "batch", "dtype")
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--worker", folder, *flags(args, names)]
        workers = {"mljax": Worker([sys.executable, __file__, *shared])}
        if args.torch_python:
            workers["torch"] = Worker([args.torch_python, str(PEER), *shared])
            ours, peers = (w.about["losses"] for w in workers.values())
            bound = TOLERANCE[args.dtype]
            for name in ours:
                same(f"the losses of {name}", ours[name], peers[name], bound)
        times: dict[str, list[float]] = {}
        for part in args.parts:
            more, warm = PARTS[part]
            steps = more * args.steps
            times |= in_turns(workers, args.rounds, steps, warm, ending=part)
        for worker in workers.values():
            worker.end()
    about = {name: worker.about for name, worker in workers.items()}
    return {**summary(times), "costs": about["mljax"].pop("costs"), "about": about}


def table(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """A row for each contestant and head."""
    lines = [
        f"{f'{args.classes} labels':<18}"
        + "".join(f"{part:>28}" for part in args.parts)
        + "   10^6 params  10^9 a step  10^6 an image"
    ]
    for worker in found["about"]:
        for head in args.heads:
            line = f"{worker:<6} {head:<11}"
            for part in args.parts:
                ms = found["median_ms"][f"{worker} {head} {part}"]
                more = ""
                if head != "linear" and "linear" in args.heads:
                    plain = found["median_ms"][f"{worker} linear {part}"]
                    more = f" ({ms - plain:+.1f}, {100 * (ms / plain - 1):+.1f}%)"
                line += f"{f'{ms:.1f}{more}':>28}"
            cost = found["costs"][head]
            line += f"{cost['parameters'] / 1e6:>14.2f}{cost['step'] / 1e9:>13.2f}"
            lines.append(f"{line}{cost['image'] / 1e6:>15.2f}")
    return "\n".join(lines)


def contestant(args: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """Ours: what it says of itself, and "HEAD PART" -> one step of it."""
    import jax
    import numpy as np
    import our_step

    classes = int(args.classes)
    batch = our_step.draw_batch(args.batch, args.size, classes)
    np.savez(folder / "batch.npz", **batch)
    images = np.resize(batch["image"], (IMAGES, *batch["image"].shape[1:]))
    about: dict[str, Any] = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "costs": {},
        "losses": {},
    }
    runs: dict[str, Any] = {}
    for head in args.heads:
        config = our_step.settings(args.backbone, head, args.size)
        model = our_step.build(config, classes, args.dtype)
        our_step.write_weights(folder, model, head)
        shape = our_step.map_of(model, batch["image"].shape)
        fmap = np.random.default_rng(0).random(shape.shape).astype(np.float32)
        np.save(folder / "map.npy", fmap)
        about["costs"][head] = costs(model, shape)
        alone = our_step.Head(config, model, fmap, batch["labels"], shape.dtype)
        about["losses"][head] = alone.loss()
        if "alone" in args.parts:
            alone.step()
            runs[f"{head} alone"] = alone.step
        if "step" in args.parts:
            training = our_step.Training(config, model, batch)
            # Two steps for the caches; the first loss is the peer's too.
            first, _ = training.step(), training.step()
            if head in ("linear", "gcn"):
                about["losses"][f"{head}, first step"] = first
            runs[f"{head} step"] = training.step
        if "inference" in args.parts:
            run = our_step.predictor(config, model, classes)
            run(images)
            runs[f"{head} inference"] = lambda run=run: run(images)
    return about, runs


def costs(model: Any, fmap: Any) -> dict[str, int]:
    """Of the head alone: parameters; multiply-adds of a forward pass for the maps of a
    step, with the graph, and for one image at inference, without."""
    import jax
    from flax import nnx
    from model_costs import count

    from mljax.models import folded

    def multiply_adds(head: Any, maps: int) -> int:
        graph, state = nnx.split(head)
        shape = jax.ShapeDtypeStruct((maps, *fmap.shape[1:]), fmap.dtype)
        traced = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, shape)
        return count(traced.jaxpr)

    params = jax.tree.leaves(nnx.state(model.head, nnx.Param))
    return {
        "parameters": sum(x.size for x in params),
        "step": multiply_adds(model.head, fmap.shape[0]),
        "image": multiply_adds(folded(model).head, 1),
    }


if __name__ == "__main__":
    if "--worker" in sys.argv:
        as_trained()
    main()
