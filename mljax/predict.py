"""Labels for images: `python -m mljax.predict --checkpoint DIR --images FOLDER ...`.

    from mljax import predict

    model = predict.load("runs/mine")  # a work directory or one saved step
    model.predict(["photo.jpg"])  # probabilities [images, classes]
    model.labels(["photo.jpg"])  # [["sky", "tree"]]

The checkpoint alone is enough: it holds the config, the class names and how images are
prepared. Nothing in it is executed, and TensorFlow is not needed.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mljax import main as program
from mljax import memory
from mljax.errors import UserError, complain
from mljax.prediction_files import (
    FORMATS,
    NOT_A_NUMBER,
    Row,
    check_writable,
    checked,
    find_images,
    writer,
)
from mljax.tables import count

if TYPE_CHECKING:
    from mljax.decision import Decision

BATCH = 32
_NAMELESS = "an image"


def load(checkpoint: str | Path, batch_size: int = BATCH) -> "Predictor":
    """The model of a work directory (then its best) or of one saved step.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of a newer version.
    """
    from mljax import checkpoint as checkpoints
    from mljax import decision
    from mljax.models import folded, pretrained

    step = checkpoints.find_best(Path(checkpoint).absolute())
    model, about = pretrained.restore(step)
    decided = decision.load(step, about["class_names"])
    return from_model(folded(model), about, decided, batch_size)


def from_model(
    model: Any, about: dict[str, Any], decided: "Decision", batch_size: int = BATCH
) -> "Predictor":
    """A predictor of a module, for images of the config in `about`."""
    import jax

    from mljax import config as configs
    from mljax import decision, step
    from mljax.data.augment import normalise
    from mljax.models.functional import as_function, split

    config, weights = configs.from_dict(about["config"]), split(model)
    outputs_of = step.make_eval_step(
        as_function(model), normalise, flip=config.eval.flip
    )

    @jax.jit
    def run(weights: Any, images: jax.Array) -> jax.Array:
        params, batch_stats = weights
        outputs = outputs_of(params, batch_stats, images)
        return decision.probabilities(outputs, config.loss, decided.calibration)

    return Predictor(lambda images: run(weights, images), about, decided, batch_size)


class Predictor:
    """A trained model, ready for images.

    Attributes:
        class_names: of the columns of probabilities.
        thresholds: float32 [num_classes]; a label is said above its own. Those of the
            checkpoint (`mljax.thresholds`), else 0.5.
        config: of the run that trained it.
        batch_size: images computed at a time.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], Any],
        about: Mapping[str, Any],
        decided: "Decision",
        batch_size: int = BATCH,
    ):
        """run: uint8 [batch, height, width, 3] -> float32 [batch, num_classes]."""
        from mljax import config as configs

        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: must be at least 1")
        self.class_names: list[str] = list(about["class_names"])
        self.thresholds = decided.thresholds
        self.config = configs.from_dict(about["config"])
        self.batch_size = batch_size
        self._run = run

    def predict(self, images: Any) -> np.ndarray:
        """Probabilities, float32 [num_images, num_classes].

        Args:
            images: a sequence of paths, bytes of files, PIL images and arrays (uint8
                [height, width, 3], RGB), one array [num_images, height, width, 3], or
                a single image of any of these kinds.

        Raises:
            UserError: an image cannot be read; names it, or its place.
        """
        from PIL import Image

        single = getattr(images, "ndim", 0) in (2, 3)  # an array of whatever library
        if single or isinstance(images, str | Path | bytes | Image.Image):
            images = [images]
        rows = []
        for place, row in enumerate(self.each(images)):
            if row.error:
                name = row.path if row.path != _NAMELESS else f"images[{place}]"
                raise UserError(f"{name}: cannot be read ({row.error})")
            rows.append(row.probabilities)
        return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), "f4")

    def labels(self, images: Any, threshold: float | None = None) -> list[list[str]]:
        """The names of the labels with probability > threshold, the likeliest first.

        threshold: one for all classes; None: `thresholds`. `images` and errors as in
        `predict`.
        """
        return [self.names(p, threshold) for p in self.predict(images)]

    def names(
        self, probabilities: np.ndarray, threshold: float | None = None
    ) -> list[str]:
        """The labels in a row of probabilities [num_classes], as `labels`."""
        order = np.argsort(-probabilities, kind="stable")
        said = probabilities > (self.thresholds if threshold is None else threshold)
        return [self.class_names[i] for i in order if said[i]]

    def each(self, images: Iterable[Any]) -> Iterator[Row]:
        """One row an image, in order; an unreadable one has an error instead."""
        with ThreadPoolExecutor() as pool:
            batch: list[Any] = []
            for image in images:
                batch.append(image)
                if len(batch) == self.batch_size:
                    yield from self._batch(batch, pool)
                    batch = []
            yield from self._batch(batch, pool)

    def _batch(self, batch: list[Any], pool: ThreadPoolExecutor) -> Iterator[Row]:
        read = list(pool.map(self._read, batch))
        pixels = [image for image in read if isinstance(image, np.ndarray)]
        found = iter(self.probabilities(pixels))
        for image, result in zip(batch, read, strict=True):
            path = str(image) if isinstance(image, str | Path) else _NAMELESS
            if isinstance(result, str):
                yield Row(path, np.zeros(0, np.float32), result)
            else:
                yield Row(path, next(found), "")

    def _read(self, image: Any) -> np.ndarray | str:
        """Pixels of the size that the model takes, or why there are none."""
        from mljax import images

        try:
            return images.load(image, self.config.data)
        except images.UnreadableImage as error:
            return str(error)

    @property
    def batch_sizes(self) -> list[int]:
        """Of the batches that are computed, each compiled once: 1, 2, 4 ... and
        `batch_size`."""
        powers = [1 << i for i in range(self.batch_size.bit_length())]
        return sorted({*powers, self.batch_size})

    def probabilities(self, pixels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Of at most `batch_size` images of the size that the model takes, uint8."""
        if not len(pixels):
            return np.zeros((0, len(self.class_names)), np.float32)
        count = next(size for size in self.batch_sizes if size >= len(pixels))
        batch = np.zeros((count, *pixels[0].shape), np.uint8)
        batch[: len(pixels)] = pixels
        return np.asarray(self._run(batch))[: len(pixels)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mljax.predict",
        allow_abbrev=False,
        description="Write the labels of images to a file.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="work directory, or a step")
    add(
        "--images",
        required=True,
        metavar="WHAT",
        help="a folder (with those below it), a pattern in quotes ('photos/*.jpg'), an "
        "image, or a text file with a path a line",
    )
    add("--output", required=True, metavar="FILE", help=", ".join(FORMATS))
    add(
        "--threshold",
        type=float,
        help="labels above it (default: those chosen by mljax.thresholds, else 0.5)",
    )
    add("--batch-size", type=int, default=BATCH, help=f"default: {BATCH}")
    add("--show", metavar="PNG", help="also draw some of the images with their labels")
    add("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.threshold is not None and not 0 <= args.threshold < 1:
        raise UserError(f"--threshold={args.threshold}: must be at least 0, below 1")
    for flag, name in (("--output", args.output), ("--show", args.show)):
        if name and Path(name).exists() and not args.overwrite:
            raise UserError(f"{flag} {name}: exists; name another, or add --overwrite")
    if args.show and Path(args.show).suffix.lower() != ".png":
        raise UserError(f"--show {args.show}: must end in .png")
    if args.show:
        check_writable("--show", Path(args.show))
    paths = find_images(args.images)
    program.quiet()
    with writer(args.output) as output:  # an unwritable place is found before the work
        from mljax import backend

        backend.set_up()
        model = load(args.checkpoint, args.batch_size)
        output.begin(model.class_names)
        shown = set(np.linspace(0, len(paths) - 1, 24).astype(int)) if args.show else ()
        rows, unreadable = [], 0
        for i, row in enumerate(map(checked, model.each(paths))):
            named = () if row.error else model.names(row.probabilities, args.threshold)
            output.add(row, list(named))
            if row.error:
                unreadable += 1
                failed = row.error if row.error == NOT_A_NUMBER else "cannot be read"
                reason = "" if failed == row.error else f" ({row.error})"
                complain(f"\r{row.path}: {failed}{reason}")
            elif i in shown:
                rows.append(row)
            _progress(i + 1, len(paths))
    done = count(len(paths), "image")
    print(f"{done}, {unreadable} could not be read: {args.output}")
    if args.show and rows:
        _draw(Path(args.show), rows, model, args.threshold)
        print(f"picture: {args.show}")
    if unreadable == len(paths):
        raise UserError(f"--images {args.images}: none of the images could be read")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done == total or done % 8 == 0):
        bar = "#" * (30 * done // total)
        end = "\n" if done == total else ""
        print(f"\r[{bar:<30}] {done}/{total}", end=end, file=sys.stderr, flush=True)


def _draw(
    file: Path, rows: list[Row], model: Predictor, threshold: float | None
) -> None:
    from mljax import images, pictures

    pixels = [
        pictures.shrink(images.read(row.path, model.config.data.max_pixels))
        for row in rows
    ]
    probabilities = np.array([row.probabilities for row in rows])
    names = model.class_names
    above = model.thresholds if threshold is None else threshold
    pictures.sheet(file, pixels, probabilities, None, names, above)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see `mljax.main.command`."""
    return program.command(parse, run, argv)


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
