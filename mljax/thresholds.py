"""Choose thresholds: `python -m mljax.thresholds --checkpoint DIR`.

Runs the checkpoint on images that it was not trained on, chooses a threshold for each
class, and keeps them with the checkpoint: `mljax.predict` and `mljax.export` use them.
`--calibrate` also makes its probabilities say how often it is right.

What that gains is measured on other images than those it was chosen on: many times the
images are split in two halves at random, one to choose on and one to measure on.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mljax import (
    calibration,
    decision,
    held_out,
    memory,
    metrics,
    operating_points,
    tables,
)
from mljax import main as program
from mljax.decision import DEFAULT, Decision
from mljax.errors import UserError

_FIGURES = ("OF1", "CF1", "ECE", "class ECE")

_LONG = 10.0  # seconds for a split, from which on it is told how many are done

# Chooses on (logits, labels), both [num_images, num_classes].
Chooser = Callable[[np.ndarray, np.ndarray], tuple[Decision, operating_points.Choice]]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mljax.thresholds",
        allow_abbrev=False,
        description="Choose a threshold for each class on held-out images and keep "
        "them with the checkpoint.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="work directory, or a step")
    add(
        "--data",
        choices=held_out.CHOICES,
        help="of the run: what it held out of train (default, if any), or val",
    )
    add("--root", metavar="FOLDER", help="of the data, if it is no longer where it was")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        "--beta", type=float, default=1.0, help="highest F-beta (default: 1)"
    )
    wanted.add_argument("--precision", type=float, help="at least this, 0 to 1")
    wanted.add_argument("--recall", type=float, help="at least this, 0 to 1")
    add(
        "--shrink",
        type=float,
        default=10.0,
        help="a class with so many positives is half on its own, half as all classes "
        "together; its labels count for half with a hundred times as many, before that "
        "rather its calibrated probabilities (default: 10; 0 = its labels alone)",
    )
    add("--calibrate", choices=calibration.METHODS, help="the probabilities too")
    add("--per-class", action="store_true", help="calibrate each class, not all as one")
    add("--splits", type=int, default=20, help="to measure with (default: 20)")
    add("--seed", type=int, default=0, help="of the splits")
    add("--overwrite", action="store_true", help="replace thresholds chosen before")
    args = parser.parse_args(argv)
    if args.per_class and not args.calibrate:
        parser.error("--per-class goes with --calibrate")
    return args


def chooser(args: argparse.Namespace) -> Chooser:
    """What the flags ask for."""

    def choose(logits: np.ndarray, labels: np.ndarray):
        fitted = None
        if args.calibrate:
            fitted = calibration.fit(
                logits,
                labels,
                method=args.calibrate,
                per_class=args.per_class,
                shrink=args.shrink,
            )
        chosen = operating_points.choose(
            _probabilities(logits, fitted),
            labels,
            beta=args.beta,
            precision=args.precision,
            recall=args.recall,
            shrink=args.shrink,
        )
        return Decision(chosen.thresholds, fitted, {}), chosen

    return choose


def measure(
    logits: np.ndarray, labels: np.ndarray, choose: Chooser, splits: int, seed: int
) -> dict[str, np.ndarray]:
    """What is gained on images that were not chosen on.

    Args:
        logits, labels: [num_images, num_classes].
        choose: on one half of the images, at random; the other half is measured.
        splits: how many times.
        seed: of the halves.

    Returns:
        "before" (0.5, not calibrated) and "after": [splits, 4], the columns OF1, CF1,
        and the calibration error of all entries and as a mean over classes.

    Raises:
        ValueError: a half has no positive.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list] = {"before": [], "after": []}
    started = time.perf_counter()
    for done in range(1, splits + 1):
        order = rng.permutation(len(logits))
        one, other = order[: len(order) // 2], order[len(order) // 2 :]
        decided, _ = choose(logits[one], labels[one])
        plain = decision.default(logits.shape[1])
        for name, used in (("before", plain), ("after", decided)):
            found[name].append(_figures(used, logits[other], labels[other]))
        mean = (time.perf_counter() - started) / done
        if mean > _LONG and done < splits:
            left = math.ceil(mean * (splits - done) / 60)
            print(f"measured on {done} of {splits} splits, {left} min left", flush=True)
    return {name: np.array(rows) for name, rows in found.items()}


def _figures(used: Decision, logits: np.ndarray, labels: np.ndarray) -> list[float]:
    p = _probabilities(logits, used.calibration)
    report = metrics.classification_report(p, labels, used.thresholds)
    errors = (
        calibration.calibration_error(p, labels),
        calibration.class_calibration_error(p, labels),
    )
    return [report["OF1"], report["CF1"], *errors]


def _probabilities(
    logits: np.ndarray, fitted: calibration.Calibration | None
) -> np.ndarray:
    if fitted is None:
        ones, zeros = np.ones(1, np.float32), np.zeros(1, np.float32)
        fitted = calibration.Calibration(ones, zeros)
    return fitted.probabilities(logits)


def run(args: argparse.Namespace) -> None:
    _check(args)
    from mljax import backend, checkpoint

    step = checkpoint.find_best(Path(args.checkpoint).absolute())
    file = step / decision.FILE
    if file.exists() and not args.overwrite:
        raise UserError(f"{file}: exists; add --overwrite to choose again")
    program.quiet()
    backend.set_up()
    names, logits, labels, source = _scores(step, args)
    choose = chooser(args)
    try:
        decided, choice = choose(logits, labels)
    except ValueError as error:
        raise UserError(f"--checkpoint {args.checkpoint}: {error}") from None
    wanted = _wanted(args)
    about = {
        "for": wanted,
        "on": f"{len(logits)} images, {source}",
        "shrink": args.shrink,
        "calibrate": args.calibrate,
    }
    # Of many images with many labels the rest takes an hour.
    written = decision.save(step, names, decided._replace(about=about))
    print(f"chosen on {len(logits)} images ({source}) for {wanted}")
    print(_class_table(names, decided, choice, logits, labels))
    print(f"written: {written}", flush=True)
    try:
        found = measure(logits, labels, choose, args.splits, args.seed)
        means = {k: v.mean(0).tolist() for k, v in found.items()}
        gains = {k: dict(zip(_FIGURES, v, strict=True)) for k, v in means.items()}
        table = _gain_table(found)
    except ValueError as error:  # the images are too few to be halved
        gains = {}
        table = f"what is gained could not be measured on halves of them: {error}"
    about |= {"splits": args.splits, **gains}
    decision.save(step, names, decided._replace(about=about))
    print(table)


def _check(args: argparse.Namespace) -> None:
    if args.splits < 1:
        raise UserError(f"--splits={args.splits}: must be at least 1")
    for flag in ("precision", "recall"):
        wanted = getattr(args, flag)
        if wanted is not None and not 0 < wanted <= 1:
            raise UserError(f"--{flag}={wanted}: must be above 0 and at most 1")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed}: must be at least 0")
    if not 0 < args.beta < float("inf"):
        raise UserError(f"--beta={args.beta}: must be above 0 and finite")
    if not 0 <= args.shrink < float("inf"):
        raise UserError(f"--shrink={args.shrink}: must be at least 0 and finite")


def _scores(
    step: Path, args: argparse.Namespace
) -> tuple[list[str], np.ndarray, np.ndarray, str]:
    """Class names, logits and labels [num_images, num_classes], and what they are."""
    import jax

    from mljax import checkpoint, losses, results
    from mljax import config as configs
    from mljax.run import make_run

    about = checkpoint.describe(step)
    source, name = held_out.load(about, args.data, args.root)
    config = configs.from_dict(about["config"])
    config.data.on_error = "skip"
    configs.fit_devices(config, jax.device_count())
    run, variables, _ = results.best_weights(make_run(config, source.class_names), step)
    scores = run.scores({"best": variables}, source)["best"]
    read = ~np.isin(scores.places, scores.unreadable)
    held_out.left_out(int((~read).sum()), len(read))
    logits = np.asarray(losses.logits(scores.outputs, config.loss))
    return source.class_names, logits[read], scores.labels[read], name


def _wanted(args: argparse.Namespace) -> str:
    if args.precision is not None:
        return f"precision {args.precision:g}"
    if args.recall is not None:
        return f"recall {args.recall:g}"
    return f"F{args.beta:g}"


def _class_table(
    names: Sequence[str],
    decided: Decision,
    choice: operating_points.Choice,
    logits: np.ndarray,
    labels: np.ndarray,
) -> str:
    p = _probabilities(logits, decided.calibration)
    said, true = (p > decided.thresholds) & (labels != -1), labels == 1
    right, positives = (said & true).sum(0), true.sum(0)
    precision = right / np.maximum(said.sum(0), 1)
    recall = right / np.maximum(positives, 1)
    order = np.argsort(-positives, kind="stable")
    lines = []
    for c in order:
        note = "" if choice.reached[c] else "  not reached"
        lines.append(
            f"{names[c]:<24} {positives[c]:>9} {decided.thresholds[c]:>9.3f} "
            f"{100 * precision[c]:>6.1f} {100 * recall[c]:>6.1f}{note}"
        )
    head = f"{'class':<24} {'positives':>9} {'threshold':>9} {'P':>6} {'R':>6}"
    overall = f"{'(all classes as one)':<24} {'':>9} {choice.overall:>9.3f}"
    return "\n".join([head, *tables.ends(lines, decision.FILE), overall])


def _gain_table(found: dict[str, np.ndarray]) -> str:
    before, after = found["before"], found["after"]
    title = f"chosen on one half, measured on the other; mean of {len(before)} splits"
    shown = [title, f"{'':<24}" + "".join(f"{name:>11}" for name in _FIGURES)]
    rows = ((f"p > {DEFAULT}, as trained", before), ("as chosen", after))
    for name, figures in rows:
        cells = "".join(f"{100 * x:>11.2f}" for x in figures.mean(0))
        shown.append(f"{name:<24}{cells}")
    better = after - before > 0
    better[:, 2:] = after[:, 2:] < before[:, 2:]
    cells = "".join(f"{f'{n} of {len(before)}':>11}" for n in better.sum(0))
    shown.append(f"{'better in':<24}{cells}")
    return "\n".join(shown)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see `mljax.main.command`."""
    return program.command(parse, run, argv)


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
