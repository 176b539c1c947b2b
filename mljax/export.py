"""Write a model for other programs: `python -m mljax.export --checkpoint DIR ...`.

What is exported takes uint8 images, any number of them, and has everything inside:
normalising, the network, probabilities (calibrated), labels (by the thresholds of the
checkpoint), the class names. It computes in float32. But for --int8 nothing is
kept that gives other probabilities than the checkpoint does.

    from mljax import export

    model = export.load("model.onnx")  # or what the other formats wrote
    model.predict(["photo.jpg"])  # as mljax.predict: probabilities [images, classes]
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mljax import held_out, memory, whole
from mljax import main as program
from mljax.errors import UserError, complain
from mljax.prediction_files import check_writable

if TYPE_CHECKING:
    from mljax.data.source import Source
    from mljax.predict import Predictor

TOLERANCE = 1e-4  # of a probability
_FORMATS = ("stablehlo", "savedmodel", "onnx")  # those of mljax.formats
_SAMPLES = 16

Runs = Callable[[np.ndarray], Any]


def load(path: str | Path, batch_size: int = 32) -> "Predictor":
    """An exported model of any format, to be used as one of `mljax.predict.load`.

    Raises:
        UserError: it is no export, is damaged or of a newer version, or a package is
            missing to run it.
    """
    from mljax import decision
    from mljax.formats import FORMATS
    from mljax.predict import Predictor

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or directory")
    forms = [form for form in FORMATS.values() if form.owns(path)]
    if not forms:
        raise UserError(
            f"{path}: is not a model exported by mljax (python -m mljax.export makes "
            "one of a work directory)"
        )
    run, about = forms[0].read(path)
    decided = decision.from_json(about["decision"], about["class_names"])
    return Predictor(lambda images: run(images)[0], about, decided, batch_size)


def samples(height: int, width: int) -> np.ndarray:
    """Pictures to compare two models on, uint8 [16, height, width, 3].

    Noise from fine to coarse, as photos have both; one is black and one white.
    """
    rng = np.random.default_rng(0)
    made = np.empty((_SAMPLES, height, width, 3), np.uint8)
    for i in range(_SAMPLES):
        grain = min(2 ** (i % 6), height, width)
        cells = -(-height // grain), -(-width // grain), 3
        coarse = rng.integers(0, 256, cells, np.uint8)
        made[i] = coarse.repeat(grain, 0).repeat(grain, 1)[:height, :width]
    made[-2], made[-1] = 0, 255
    return made


def difference(run: Runs, expected: np.ndarray, images: np.ndarray) -> float:
    """The largest difference from `expected` [n, num_classes], over two batch sizes.

    Raises:
        UserError: the shapes are others, or something is not a number.
    """
    largest = 0.0
    for size in (1, len(images)):
        for start in range(0, len(images), size):
            wanted = expected[start : start + size]
            found = np.asarray(run(images[start : start + size])[0])
            if found.shape != wanted.shape or not np.isfinite(found).all():
                raise UserError(
                    f"the exported model gives {list(found.shape)} for a batch of "
                    f"{size}, or no numbers; nothing was written"
                )
            largest = max(largest, float(np.abs(found - wanted).max()))
    return largest


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mljax.export",
        allow_abbrev=False,
        description="Write a model for other programs: JAX and XLA (stablehlo), "
        "TensorFlow (savedmodel), ONNX Runtime, OpenVINO and TensorRT (onnx).",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="work directory, or a step")
    add("--format", required=True, choices=_FORMATS)
    add("--output", required=True, metavar="PATH", help="savedmodel: a directory")
    add("--images", metavar="WHAT", help="compare on these; default: drawn ones")
    add("--int8", action="store_true", help="onnx: weights of 8 bits, a quarter as big")
    add("--data", choices=held_out.CHOICES, help="measure mAP on these images too")
    add("--root", metavar="FOLDER", help="of the data, if it is no longer where it was")
    add("--overwrite", action="store_true", help="replace what was exported before")
    args = parser.parse_args(argv)
    if args.int8 and args.format != "onnx":
        parser.error("--int8 goes with --format onnx")
    if args.root and not args.data:
        parser.error("--root goes with --data")
    return args


def run(args: argparse.Namespace) -> None:
    output = Path(args.output)
    # Other programs compute in float32, GPUs and TPUs with fewer bits unless told. JAX
    # reads this when it is imported.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _check_output(args, output)
    from mljax import backend, checkpoint, decision, predict
    from mljax.formats import FORMATS, onnx_file
    from mljax.formats.program import make
    from mljax.models import folded, pretrained

    program.quiet()
    if args.format == "onnx":
        onnx_file.require_all()
    backend.set_up()
    step = checkpoint.find_best(Path(args.checkpoint).absolute())
    model, about = pretrained.restore(step, dtype="float32")
    decided = decision.load(step, about["class_names"])
    model = folded(model)
    reference = predict.from_model(model, about, decided)
    made = make(model, about, decided)
    images = _images(args.images, reference)
    expected = reference.probabilities(images)
    source = held_out.load(about, args.data, args.root) if args.data else None

    form = FORMATS[args.format]
    part = whole.part_of(output)
    _remove(part)
    try:
        with whole.named(output):
            form.write(made, part)
        found, _ = form.read(part)
        off = difference(found, expected, images)
        print(
            f"compared: {len(images)} images, probabilities differ by at most {off:.1e}"
        )
        if not off <= TOLERANCE:
            raise UserError(
                f"--format {args.format}: the exported model is not the checkpoint: "
                f"probabilities differ by {off:.1e}, more than {TOLERANCE:g}; nothing "
                "was written"
            )
        if args.int8:
            from mljax.formats import int8

            with whole.named(output):
                int8.quantise(part)
            found, _ = form.read(part)
            off = difference(found, expected, images)
            print(f"int8:     probabilities differ by at most {off:.1e}")
        if source is not None:
            _measure(reference, found, *source)
        _replace(part, output)
    finally:
        _remove(part)
    count = len(made.about["class_names"])
    height, width = made.sides
    print(f"written:  {output}, {_megabytes(output):.2f} MB")
    print(f"          uint8 [batch, {height}, {width}, 3] -> {count} classes")


def _check_output(args: argparse.Namespace, output: Path) -> None:
    """Raises UserError where something would be lost, or nothing can be written."""
    from mljax.formats import FORMATS

    if args.format == "onnx" and output.suffix.lower() != ".onnx":
        raise UserError(f"--output {output}: must end in .onnx")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if not output.exists():
        check_writable("--output", output)
        return
    if not args.overwrite:
        raise UserError(f"--output {output}: exists; name another, or add --overwrite")
    if not FORMATS[args.format].may_replace(output):
        raise UserError(
            f"--output {output}: exists and is no {args.format} export, or holds other "
            "files too, so it is not replaced; name another"
        )


def _images(what: str | None, reference: "Predictor") -> np.ndarray:
    from mljax import images
    from mljax.prediction_files import find_images

    data = reference.config.data
    if what is None:
        return samples(*images.sides_of(data))

    found, reasons = [], []
    for path in find_images(what):
        try:
            found.append(images.load(path, data))
        except images.UnreadableImage as error:
            reasons.append(f"--images: {path}: {error}")
        if len(found) == _SAMPLES:
            break
    if not found:
        raise UserError(reasons[0])
    for reason in reasons:
        complain(f"{reason}; left out")
    return np.stack(found)


def _measure(reference: "Predictor", found: Runs, source: "Source", name: str) -> None:
    """Prints the mAP of the checkpoint and of what was exported."""
    from mljax import metrics
    from mljax.data import pipeline

    data = reference.config.data.copy_and_resolve_references()
    data.on_error = "skip"
    batches = pipeline.eval_batches(
        source, data_config=data, batch_size=reference.batch_size
    )
    labels, before, after = [], [], []
    unreadable = 0
    for batch in batches:
        kept = batch["mask"] & batch["ok"]
        unreadable += int((batch["mask"] & ~batch["ok"]).sum())
        labels.append(batch["labels"][kept])
        before.append(reference.probabilities(batch["image"])[kept])
        after.append(np.asarray(found(batch["image"])[0])[kept])
    held_out.left_out(unreadable, len(source))
    truth = np.concatenate(labels)
    one, other = (
        100 * metrics.mean_average_precision(np.concatenate(p), truth)
        for p in (before, after)
    )
    print(f"mAP:      {one:.2f} -> {other:.2f} ({other - one:+.2f}), {name}")


def _replace(part: Path, output: Path) -> None:
    """A directory cannot be replaced in one step: the old one goes aside first."""
    if output.is_symlink():
        output.unlink()  # what it names is left alone
    if not output.is_dir():
        part.replace(output)
        return
    aside = output.with_name(f".{output.name}.old")
    _remove(aside)
    output.replace(aside)
    part.replace(output)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _megabytes(path: Path) -> float:
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files) / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see `mljax.main.command`."""
    return program.command(parse, run, argv)


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
