"""SAM, its cheaper forms and none at all, on the same photos for the same time.

python benchmarks/sam_forms.py --root PHOTOS --weights WEIGHTS.safetensors \
    --workdirs FOLDER [--forms full none] [--seeds 0 1 2]

Trains configs/corel5k.py with each form and seed, one run after the other, each in a
work directory FOLDER/FORM-SEED. Killed and started again it goes on, and what is
finished is not trained again. A form that takes fewer passes over the network is given
more epochs, so that all take as many passes as the config does with SAM (a pass is
forward and backward). Then prints the table: the mean and each seed's mAP (of the best
epoch), epochs, images/s, and the minutes of training that are left when evaluation and
compiling are taken away.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import photo_runs

sys.path.insert(0, str(photo_runs.ROOT))


class Form(NamedTuple):
    passes: float  # a step
    flags: tuple[str, ...]


ONE_PASS = ("--config.sam.update_stats=both",)  # there is no first one to choose
FORMS = {
    "full": Form(2.0, ()),
    "none": Form(1.0, ("--config.sam.rho=0", *ONE_PASS)),
    "every_steps": Form(1.2, ("--config.sam.every_steps=5",)),
    "every_images": Form(1.25, ("--config.sam.every_images=4",)),
    "momentum": Form(
        1.0,
        ("--config.sam.direction=momentum", "--config.sam.rho=0.75", *ONE_PASS),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    photo_runs.add_arguments(parser)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--set", nargs="*", default=(), help="more flags for all")
    args = parser.parse_args()

    from mljax import config as configs
    from mljax.data import annotations

    config = configs.load("configs/corel5k.py", args.variant)
    path = Path(args.root) / config.data.train
    images = len(annotations.read(path, "train", config.data.max_pixels))
    rows = []
    for name in args.forms:
        form = FORMS[name]
        epochs = round(config.epochs * FORMS["full"].passes / form.passes)
        flags = [f"--config.epochs={epochs}", *form.flags, *args.set]
        runs = [
            photo_runs.train(args, f"{name}-{seed}", seed, flags) for seed in args.seeds
        ]
        rates = [run.rate for run in runs if run.rate]
        rows.append((name, epochs, [run.score for run in runs], rates))
    print(f"\n{'SAM':<13} {'mAP':>6}  {'seeds':<20} epochs  images/s  minutes")
    for name, epochs, scores, rates in rows:
        each = " ".join(f"{100 * score:.2f}" for score in scores)
        row = f"{name:<13} {100 * statistics.mean(scores):6.2f}  {each:<20} {epochs:6}"
        if rates:
            rate = statistics.median(rates)
            row += f"  {rate:8.0f}  {epochs * images / rate / 60:7.1f}"
        print(row)


if __name__ == "__main__":
    main()
