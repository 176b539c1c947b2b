"""The dataset doctor: what a data set holds, and what is wrong with it.

python -m mljax.data.inspect --config configs/coco.py --config.data.root=FOLDER \
    --output DIR

Reads the data of a config as training would, each image once, and writes into DIR:
report.html (one page, nothing beside it is needed), report.json (the same, with every
name), class_weights.json (for config.loss.class_weights), cooccurrence.png and
contact_sheet.png. Whatever it finds, the exit code is 0 if the data could be read; it
is 1 where an annotation file is missing or wrong.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from mljax import main as program
from mljax import tables, workdir
from mljax.errors import UserError

if TYPE_CHECKING:
    from mljax.data.inspect_images import ImageFacts
    from mljax.data.source import Source

REPORT, WEIGHTS = "report.json", "class_weights.json"
PAGE, SHEET = "report.html", "contact_sheet.png"
_PART = ".report.part"  # where all files are until the last is written
_THUMBNAIL = 200  # pixels


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = program.make_parser(
        "python -m mljax.data.inspect",
        "Look at a data set before training: counts, labels, unreadable and duplicate "
        "images, class weights.",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the report goes"
    )
    return program.parse_with(parser, argv)


def run(args: argparse.Namespace) -> None:
    config = program.read_config(args)
    folder = _output(args.output)
    report, sources, facts = inspect(config.data, config.seed, print)
    report = {"config": args.config, **report}
    from mljax.data import inspect_page

    picked = {
        split: _pick(source, facts[split], 24 if split == "train" else 12)
        for split, source in sources.items()
    }
    part = folder / _PART
    shutil.rmtree(part, ignore_errors=True)  # of a start that was killed
    part.mkdir(parents=True)
    try:
        _draw(part, sources["train"], picked["train"])
        page = inspect_page.page(report, sources, picked, part)
        workdir.write_text(part / WEIGHTS, _weights_text(report["class_weights"]))
        text = json.dumps(report, indent=2, allow_nan=False)
        workdir.write_text(part / REPORT, text + "\n")
        workdir.write_text(part / PAGE, page)
        if not picked["train"]:
            (folder / SHEET).unlink(missing_ok=True)  # of an earlier report
        # First what tells the next start that this folder is one of a report.
        (part / REPORT).replace(folder / REPORT)
        for file in part.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print()
    print("\n".join(_table(report["classes"], list(sources))))
    print()
    for finding in report["findings"]:
        text = finding["text"].replace("\n", "\\n")  # in the name of a file
        print(f"{finding['level']:<8} {text}")
    print(f"report:  {folder / PAGE}")
    weights = shlex.quote(str(folder / WEIGHTS))
    print(f"weights: --config.loss.class_weights={weights} weighs the classes")


def inspect(
    data_config: ConfigDict, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, "Source"], dict[str, list["ImageFacts"]]]:
    """What report.json holds, the sources and what is known of their images.

    Args:
        data_config: `config.data`.
        seed: of the run; it decides what is held out.
        say: is told what happens.

    Raises:
        UserError: the data cannot be read.
    """
    from mljax.data import DATASETS, inspect_findings, inspect_images, inspect_labels

    if data_config.name not in DATASETS:
        raise UserError(
            f"config.data.name = {data_config.name!r}: must be one of "
            f"{', '.join(DATASETS)}"
        )
    # What cannot be read, or is not there, is what is looked for.
    loose = data_config.copy_and_resolve_references()
    loose.on_error = "skip"
    loaded = DATASETS[data_config.name](loose, seed)
    order = {"train": loaded.train, "holdout": loaded.holdout, "val": loaded.val}
    sources = {name: s for name, s in order.items() if s is not None}
    splits = {split: inspect_labels.split_counts(s) for split, s in sources.items()}
    facts = {}
    for split, source in sources.items():
        counts = splits[split]
        say(
            f"{split + ':':<9}{counts['images']} images, {len(source.class_names)} "
            f"classes, {counts['labels_per_image']:.2f} labels an image"
        )
        progress = _progress(len(source), say)
        facts[split] = inspect_images.scan(source, data_config.max_pixels, progress)
        splits[split] |= inspect_labels.image_counts(source, facts[split])
    report: dict[str, Any] = {
        "data": data_config.to_dict(),
        "class_names": loaded.train.class_names,
        "splits": splits,
        "classes": inspect_labels.class_counts(sources),
        "strongest_pairs": inspect_labels.strongest_pairs(loaded.train),
        "duplicates": inspect_labels.duplicates(sources, facts),
        "class_weights": inspect_labels.class_weights(loaded.train),
    }
    report["findings"] = inspect_findings.findings(report)
    return report, sources, facts


def _output(path: str) -> Path:
    """The folder of the report: new, empty, or of an earlier report."""
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {path}: is a file, not a directory")
    there = {file.name for file in folder.iterdir()} if folder.exists() else set()
    if there - {_PART} and REPORT not in there:
        raise UserError(
            f"--output {path}: is not empty and holds no earlier report; name a new or "
            "empty directory"
        )
    if REPORT not in there:
        return folder
    try:
        report = (folder / REPORT).read_text(encoding="utf-8")
        written = json.loads(report)["class_weights"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--output {path}: {REPORT} there is of another program; name a new or "
            "empty directory"
        ) from None
    if (weights := folder / WEIGHTS).exists():
        if weights.read_text(encoding="utf-8") != _weights_text(written):
            raise UserError(
                f"--output {path}: {WEIGHTS} there is not as it was written; move it "
                "away, or name another directory"
            )
    return folder


def _weights_text(weights: Mapping[str, Any]) -> str:
    return json.dumps(weights, indent=2, ensure_ascii=False) + "\n"


def _table(classes: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> list[str]:
    """Positives and unknown labels of the classes, the most frequent first."""
    order = sorted(classes, key=lambda row: -row["train"]["positives"])
    heads = "".join(f"{split:>9}" for split in splits)
    lines = []
    for row in order:
        counts = "".join(f"{row[split]['positives']:>9}" for split in splits)
        unknown = sum(row[split]["unknown"] for split in splits)
        lines.append(f"{row['name']:<24}{counts}{unknown:>9}")
    return [f"{'label':<24}{heads}  unknown", *tables.ends(lines, PAGE)]


def _progress(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Speaks every ten seconds."""
    started = spoken = time.perf_counter()

    def progress(done: int) -> None:
        nonlocal spoken
        now = time.perf_counter()
        if now - spoken < 10 or done == total:
            return
        spoken = now
        left = (now - started) * (total - done) / done
        say(f"         {done} of {total} images read, {left:.0f} s left")

    return progress


def _pick(
    source: "Source", facts: Sequence["ImageFacts"], count: int
) -> list[tuple[int, np.ndarray]]:
    """(row, small picture) of readable images, spread over the source."""
    from mljax.data.inspect_images import thumbnail

    readable = [i for i, f in enumerate(facts) if not f.reason]
    places = np.unique(np.linspace(0, len(readable) - 1, count).round().astype(int))
    if not readable:
        return []
    rows = [readable[p] for p in places]
    return [(row, thumbnail(source, row, _THUMBNAIL)) for row in rows]


def _draw(
    folder: Path, train: "Source", picked: Sequence[tuple[int, np.ndarray]]
) -> None:
    from mljax import label_graph_data, label_graph_picture, pictures

    label_graph_picture.draw(
        folder / "cooccurrence.png",
        train.class_names,
        label_graph_data.cooccurrence(train.labels),
        tau=0.4,
    )
    if picked:
        pictures.contact_sheet(
            folder / SHEET,
            [picture for _, picture in picked],
            train.labels[[row for row, _ in picked]],
            train.class_names,
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return program.exit_code(lambda: run(args), "interrupted: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
