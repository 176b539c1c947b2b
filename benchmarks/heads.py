"""Every head on the same photos: mAP over seeds, size, multiply-adds, latency.

python benchmarks/heads.py --root PHOTOS --weights WEIGHTS.safetensors \
    --workdirs FOLDER [--heads linear gcn] [--seeds 0 1 2]

Trains configs/corel5k.py (with --variant plain that variant of it) with each head and
seed, one run after the other, each in a work directory FOLDER/HEAD-SEED. Killed and
started again it goes on, and what is finished is not trained again. Then prints the
table: the mean and each seed's mAP (of the best epoch), parameters (10^6),
multiply-adds of an image (10^6), milliseconds for an image and for eight (medians, as
the config predicts: with eval.flip each photo and its mirror image), and the images/s
of training, evaluation apart.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import photo_runs

sys.path.insert(0, str(photo_runs.ROOT))

HEADS = ("linear", "gcn", "gat", "ml_decoder", "query2label", "csra")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    photo_runs.add_arguments(parser)
    add("--heads", nargs="+", default=HEADS, choices=HEADS)
    add("--set", nargs="*", default=(), help="more flags, as --config.ema.decay=0.9")
    return parser.parse_args()


def latency(workdir: Path) -> tuple[float, float]:
    """Medians of milliseconds for 1 and for 8 images, from pixels to probabilities."""
    import numpy as np

    from mljax import predict

    medians = []
    for count in (1, 8):
        model = predict.load(workdir, batch_size=count)
        size = model.config.data.image_size
        images = np.random.default_rng(0).integers(
            0, 255, (count, size, size, 3), np.uint8
        )
        times = []
        for _ in range(60):
            begun = time.perf_counter()
            model.predict(images)
            times.append(1e3 * (time.perf_counter() - begun))
        medians.append(statistics.median(times[10:]))
    return medians[0], medians[1]


def main() -> None:
    args = arguments()
    rows = []
    for head in args.heads:
        flags = [f"--config.model.head={head}", *args.set]
        runs = [
            photo_runs.train(args, f"{head}-{seed}", seed, flags) for seed in args.seeds
        ]
        rates = [run.rate for run in runs if run.rate]
        rows.append((head, [run.score for run in runs], runs[0].workdir, rates))
    print(f"\n{'head':<12} {'mAP':>6}  {'seeds':<20} images/s")
    for head, scores, _, rates in rows:
        each = " ".join(f"{100 * s:.2f}" for s in scores)
        rate = f"{statistics.median(rates):.0f}" if rates else "-"
        print(f"{head:<12} {100 * statistics.mean(scores):6.2f}  {each:<20} {rate}")

    from model_costs import multiply_adds, parameters

    print(f"\n{'head':<12} params 1e6  madds 1e6  ms at 1  ms at 8")
    for head, _, workdir, _ in rows:
        model = json.loads((workdir / "config.json").read_text())
        backbone, size = model["model"]["backbone"], model["data"]["image_size"]
        classes = 36
        size_1e6 = parameters(backbone, head, classes) / 1e6
        madds = multiply_adds(backbone, head, classes, size) / 1e6
        one, eight = latency(workdir)
        print(f"{head:<12} {size_1e6:10.2f} {madds:10.1f} {one:8.1f} {eight:8.1f}")


if __name__ == "__main__":
    main()
