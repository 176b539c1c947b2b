"""An epoch with the data pipeline in front, beside the bare step: what data costs.

python benchmarks/end_to_end.py --torch-python torch-env/bin/python --output FILE.json

Draws JPEG photos (--images of --photo pixels; --root takes a folder with train.json and
val.json instead), then measures in one process, in turns with PyTorch:

    bare   training steps (SAM, EMA) on one batch that is on the device already
    epoch  one epoch of `python -m mljax.main` on the files; PyTorch: a DataLoader whose
           worker processes read with PIL, and the step of train_step.py
    data   batches of the files and nothing else

The images/s of an epoch are those from its third batch to its last: starting,
compiling, evaluating and saving are left out. "waiting" is the time in which nothing
was computed because the next batch was not there: in PyTorch's loop all that it waits
for one, in ours what the trainer's log says, whose last lines are printed too.

Where a CPU computes as well, reading takes processor time from the step, so that less
than the bare rate is left even if nothing waits; the last column is what would be left
if both took turns. A --photo of 4000x3000 shows what a pipeline that is too slow
looks like.
"""

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from side_by_side import PAUSE, ROOT, Worker, answer, as_trained, flags, save

PEER = Path(__file__).with_name("torch_end_to_end.py")
# Photos, and pixels of all; the others are the same files under other names.
MOST_DRAWN, MOST_PIXELS = 48, 100_000_000
LABELS = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch-python", help="python of the peer's environment; without it ours only")
    add("--root", help="folder with train.json and val.json; without it photos drawn")
    add("--images", type=int, default=1024, help="how many are drawn")
    add("--photo", default="500x375", type=photo, help="WIDTHxHEIGHT of those drawn")
    add("--backbone", default="mobilenetv3_large_100")
    add("--size", type=int, default=224, help="pixels along a side, in training")
    add("--batch", type=int, default=32)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=10, help="bare steps, and batches alone, a round")
    add("--set", nargs="*", default=[], help="settings, as config.data.antialias=0")
    add("--output", help="JSON file for the numbers")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def photo(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: must be like 500x375")
    return text


def main() -> None:
    args = arguments()
    if args.worker:
        about, runs = contestant(args, Path(args.worker))
        return answer(about, runs)
    kept = ["backbone", "size", "batch", "dtype", "rounds", "steps", "set"]
    with tempfile.TemporaryDirectory() as folder:
        if not args.root:
            args.root = draw(args, Path(folder))
            kept += ["images", "photo"]
        names = ("root", "backbone", "size", "batch", "dtype", "steps")
        shared = ["--worker", folder, *flags(args, names)]
        own = [*shared, "--set", *args.set]
        workers = {"mljax": Worker([sys.executable, __file__, *own])}
        if args.torch_python:
            workers["torch"] = Worker([args.torch_python, str(PEER), *shared])
        runs: dict[str, dict[str, list[Any]]] = {}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                found = runs.setdefault(name, {})
                for variant in worker.about["variants"]:
                    time.sleep(PAUSE)
                    value = worker.ask(variant)["values"][0]
                    found.setdefault(variant, []).append(value)
        about = {name: worker.about for name, worker in workers.items()}
        for worker in workers.values():
            worker.end()
    results = {name: summarise(found) for name, found in runs.items()}
    print(table(args, about, results))
    print("the log of mljax:", *runs["mljax"]["epoch"][-1]["log"], sep="\n  ")
    settings = {name: getattr(args, name) for name in kept}
    save(args.output, {**settings, "results": results, "runs": runs, "about": about})


def draw(args: argparse.Namespace, folder: Path) -> str:
    """A folder as `--root` takes it."""
    import numpy as np
    from input_pipeline import draw_photos

    width, height = (int(side) for side in args.photo.split("x"))
    drawn = min(args.images, MOST_DRAWN, max(4, MOST_PIXELS // (width * height)))
    kilobytes = draw_photos(folder / "photos", (width, height), drawn)
    print(f"{args.images} JPEGs of {args.photo}, {kilobytes:.0f} KB each", flush=True)
    for i in range(drawn, args.images):
        os.link(folder / f"photos/{i % drawn:03}.jpg", folder / f"photos/{i:03}.jpg")
    rng, classes = np.random.default_rng(0), [f"label {i:02}" for i in range(LABELS)]
    rows = [
        [f"photos/{i:03}.jpg", [classes[c] for c in rng.choice(LABELS, 3, False)]]
        for i in range(args.images)
    ]
    for split, part in (("train", rows), ("val", rows[: args.batch])):
        text = json.dumps({"classes": classes, "images": part})
        (folder / f"{split}.json").write_text(text)
    return str(folder)


def summarise(found: dict[str, list[Any]]) -> dict[str, float]:
    """Medians over the rounds, and what follows from them."""
    bare, data = (
        statistics.median(run["images_per_second"] for run in found[kind])
        for kind in ("bare", "data")
    )
    epoch = statistics.median(run["images_per_second"] for run in found["epoch"])
    return {
        "bare": bare,
        "epoch": epoch,
        "data": data,
        "share_of_bare": epoch / bare,
        "waiting_s": statistics.median(run["waiting_s"] for run in found["epoch"]),
        "epoch_s": statistics.median(run["seconds"] for run in found["epoch"]),
        "taking_turns": 1 / (1 / bare + 1 / data),
    }


def table(args: argparse.Namespace, about: dict, results: dict) -> str:
    steps = about["mljax"]["steps_per_epoch"]
    lines = [
        f"{args.backbone} {args.size} px, {steps} steps of {args.batch}, SAM + EMA, "
        f"{args.dtype}; images/s",
        f"{'':<8}{'bare':>9}{'epoch':>9}{'of bare':>9}{'data':>9}{'waiting':>18}"
        f"{'taking turns':>14}",
    ]
    for name, row in results.items():
        waiting = f"{row['waiting_s']:.1f} of {row['epoch_s']:.1f} s"
        lines.append(
            f"{name:<8}{row['bare']:>9.1f}{row['epoch']:>9.1f}"
            f"{100 * row['share_of_bare']:>8.1f}%{row['data']:>9.1f}{waiting:>18}"
            f"{row['taking_turns']:>14.1f}"
        )
    return "\n".join(lines)


def watched(batches: Iterator[Any], marks: list[tuple[float, float]]) -> Iterator[Any]:
    """`batches`; when each was asked for and when it was there goes into `marks`."""
    while True:
        asked = time.perf_counter()
        batch = next(batches)
        marks.append((asked, time.perf_counter()))
        yield batch


def rates(marks: list[tuple[float, float]], batch: int) -> dict[str, float]:
    """Of an epoch, from its third batch to its last.

    When a batch is there, the step of the one before may have ended (PyTorch waits for
    it) or just begun (ours waits for that before it, once all is under way). Either way
    there are as many steps between two batches as batches.
    """
    seconds = marks[-1][1] - marks[2][1]
    return {
        "images_per_second": (len(marks) - 3) * batch / seconds,
        "seconds": seconds,
        "waiting_s": sum(given - asked for asked, given in marks[3:]),
    }


def rate(count: int, batch: int, begun: float) -> dict[str, float]:
    return {"images_per_second": count * batch / (time.perf_counter() - begun)}


def contestant(args: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """Ours: what it says of itself, and its three runs."""
    from unittest import mock

    from mljax import main as program

    program.quiet()  # before TensorFlow is imported
    import jax
    import numpy as np
    import our_step

    from mljax import sharding, speed, train
    from mljax.data import pipeline

    settings = {
        "data.name": "annotations",
        "data.root": args.root,
        "data.image_size": args.size,
        "model.backbone": args.backbone,
        "batch_size": args.batch,
        "dtype": args.dtype,
        "epochs": 1,
    }
    command = [f"--config={ROOT / 'configs' / 'corel5k.py'}:plain"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    command += [f"--{flag}" for flag in args.set]
    config = program.read_config(program.parse([*command, "--workdir=none"]))
    made = train.setup(config)
    steps = made.steps_per_epoch
    if steps < 5:
        raise SystemExit(f"{steps} steps an epoch are too few: more images are needed")
    command.append(f"--config.train.log_every={max(1, steps // 4)}")
    classes = len(made.run.class_names)
    drawn = our_step.draw_batch(args.batch, args.size, classes)
    model = our_step.build(our_step.settings(args.backbone, size=args.size), classes)
    our_step.write_weights(folder, model, "linear")
    np.savez(folder / "batch.npz", **drawn)
    step, state = made.step_at(1), made.initial()
    placed = sharding.global_batch(drawn, sharding.batch_sharding(made.run.mesh))
    state, metrics = step(state, placed, made.seed)

    def bare() -> dict[str, float]:
        nonlocal state, metrics
        jax.block_until_ready(metrics)
        begun = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = step(state, placed, made.seed)
        jax.block_until_ready(metrics)
        return rate(args.steps, args.batch, begun)

    def batches() -> Iterator[Any]:
        return pipeline.train_batches(
            made.sources.train,
            data_config=config.data,
            batch_size=args.batch,
            seed=config.seed,
        )

    def data() -> dict[str, float]:
        ready = batches()
        next(ready)
        begun = time.perf_counter()
        for _ in range(args.steps):
            next(ready)
        return rate(args.steps, args.batch, begun)

    def epoch() -> dict[str, Any]:
        marks: list[tuple[float, float]] = []
        make, read = pipeline.train_batches, speed.Speed.read
        log, figures = io.StringIO(), []

        def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
            return watched(make(*args, **kwargs), marks)

        def reading(self: Any) -> dict[str, float] | None:
            if found := read(self):  # None before a step was timed
                figures.append(found)
            return found

        with (
            tempfile.TemporaryDirectory() as runs,
            mock.patch.object(pipeline, "train_batches", batches),
            mock.patch.object(speed.Speed, "read", reading),
            contextlib.redirect_stdout(log),
        ):
            code = program.main([*command, f"--workdir={runs}/run"])
        if code:
            raise SystemExit(f"training failed; its message is above\n{log.getvalue()}")
        found = rates(marks, args.batch)
        waiting, total = (
            sum(each[key] for each in figures) for key in ("data_wait_ms", "step_ms")
        )
        found["waiting_s"] = found["seconds"] * waiting / total
        said = [line for line in log.getvalue().splitlines() if "for data)" in line]
        return {**found, "log": said}

    about = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "steps_per_epoch": steps,
    }
    return about, {"bare": bare, "epoch": epoch, "data": data}


if __name__ == "__main__":
    if "--worker" in sys.argv:
        as_trained()
    main()
