"""SAM, its cheaper forms and none at all, on the same photos for the same time.

python benchmarks/sam_forms.py --root PHOTOS --weights WEIGHTS.safetensors \
    --workdirs FOLDER [--forms full none] [--seeds 0 1 2] [--rounds 2]

Trains an epoch of configs/corel5k.py with each form, in turns, --rounds times, which
gives the milliseconds a step of each takes. Then trains with each seed and form, in
work directories FOLDER/FORM-SEED, for as many epochs as take the time that those of the
config take with SAM. Evaluation and compiling are not in that time. Killed and started
again it goes on, and what is finished is not trained again. Then prints the table: the
mean and each seed's mAP (of the best epoch), ms a step, epochs, and their minutes.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import photo_runs

sys.path.insert(0, str(photo_runs.ROOT))

ONE_PASS = "--config.sam.update_stats=both"  # there is no first one to choose
FORMS = {
    "full": (),
    "none": ("--config.sam.rho=0", ONE_PASS),
    "every_steps": ("--config.sam.every_steps=5",),
    "every_images": ("--config.sam.every_images=4",),
    "momentum": (
        "--config.sam.direction=momentum",
        "--config.sam.rho=0.75",
        ONE_PASS,
    ),
}


def step_times(args: argparse.Namespace, batch_size: int) -> dict[str, float]:
    """Milliseconds of a step of every form; kept, for a start that goes on."""
    kept = args.workdirs / "step_times.json"
    if kept.exists():
        return json.loads(kept.read_text())
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(args.rounds):
        for name in times:
            flags = ["--config.epochs=1", *FORMS[name], *args.set]
            with tempfile.TemporaryDirectory() as folder:
                run = photo_runs.train(args, f"{folder}/{name}", 0, flags)
            times[name].append(1000 * batch_size / run.rate)
    medians = {name: statistics.median(each) for name, each in times.items()}
    args.workdirs.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(medians))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    photo_runs.add_arguments(parser)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--rounds", type=int, default=2, help="epochs timed of each")
    parser.add_argument("--set", nargs="*", default=(), help="more flags for all")
    args = parser.parse_args()

    from mljax import config as configs
    from mljax.data import annotations

    config = configs.load("configs/corel5k.py", args.variant)
    path = Path(args.root) / config.data.train
    images = len(annotations.read(path, "train", config.data.max_pixels))
    times = step_times(args, config.batch_size)
    epochs = {
        name: round(config.epochs * times["full"] / times[name]) for name in args.forms
    }
    scores: dict[str, list[float]] = {name: [] for name in args.forms}
    for seed in args.seeds:
        for name in args.forms:
            flags = [f"--config.epochs={epochs[name]}", *FORMS[name], *args.set]
            run = photo_runs.train(args, f"{name}-{seed}", seed, flags)
            scores[name].append(run.score)
    print(f"\n{'SAM':<13} {'mAP':>6}  {'seeds':<20} ms a step  epochs  minutes")
    for name in args.forms:
        each = " ".join(f"{100 * score:.2f}" for score in scores[name])
        steps = epochs[name] * (images // config.batch_size)
        print(
            f"{name:<13} {100 * statistics.mean(scores[name]):6.2f}  {each:<20} "
            f"{times[name]:9.0f}  {epochs[name]:6}  {steps * times[name] / 6e4:7.1f}"
        )


if __name__ == "__main__":
    main()
