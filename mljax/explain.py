"""Heat maps for images: `python -m mljax.explain --checkpoint DIR --images FOLDER ...`.

A PNG an image: the photo, and where in it each of its likeliest labels comes from. In
Python: `mljax.heatmaps.load(DIR).heatmaps(images)`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mljax import main as program
from mljax import memory, tables
from mljax.errors import UserError, complain
from mljax.prediction_files import find_images


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mljax.explain",
        allow_abbrev=False,
        description="Draw where in images their labels come from, a PNG an image.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="work directory, or a step")
    add("--images", required=True, metavar="WHAT", help="as in mljax.predict")
    add("--output", required=True, metavar="FOLDER", help="of the PNGs; made if needed")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--top", type=int, default=3, help="the likeliest labels (default: 3)")
    which("--label", action="append", metavar="NAME", help="instead; may be repeated")
    add(
        "--method",
        default="auto",
        help="cam (class activation), attention (of ml_decoder and query2label), "
        "gradcam (of every head); auto: one of the first two (default)",
    )
    add("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(argv)


def output_files(paths: Sequence[str], folder: Path) -> list[Path]:
    """Where each picture goes: folders and names as those of the images."""
    files = [Path(os.path.abspath(path)) for path in paths]
    above = os.path.commonpath([file.parent for file in files])
    return [
        folder / file.relative_to(above).with_name(f"{file.name}.png") for file in files
    ]


def run(args: argparse.Namespace) -> None:
    if not args.output:
        raise UserError("--output is empty: name a folder (. is this one)")
    paths, folder = find_images(args.images), Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; name a folder")
    files = output_files(paths, folder)
    there = [file for file in files if file.exists()]
    if there and not args.overwrite:
        raise UserError(
            f"--output {folder}: {there[0].name} exists ({len(there)} of {len(files)} "
            "do); name another folder, or add --overwrite"
        )
    program.quiet()
    from mljax import backend, heatmap_pictures, heatmaps

    backend.set_up()
    model = heatmaps.load(args.checkpoint)
    unreadable = 0
    for start in range(0, len(paths), heatmaps.BATCH):
        part = slice(start, start + heatmaps.BATCH)
        photos, readable, drawn = [], [], []
        for path, file in zip(paths[part], files[part], strict=True):
            try:
                photos.append(model.photo(path))
                readable.append(path)  # which the model sees as `predict` reads it
                drawn.append(file)
            except UserError as error:
                unreadable += 1
                complain(str(error))
        found = model.heatmaps(readable, args.label, top=args.top, method=args.method)
        if photos:  # and label and method are known to be right
            _make(folder)
        for file, photo, maps in zip(drawn, photos, found, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            heatmap_pictures.draw(file, photo, maps)
    done = tables.count(len(paths), "image")
    print(f"{done}, {unreadable} could not be read: {folder}")
    if unreadable == len(paths):
        raise UserError(f"--images {args.images}: none of the images could be read")


def _make(folder: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be made ({error.strerror}); name another"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see `mljax.main.command`."""
    return program.command(parse, run, argv)


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
