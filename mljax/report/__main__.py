"""`python -m mljax.report --workdir DIR`: one HTML file about a run, or several.

The file needs nothing else: no network, no folder beside it. What a work directory no
longer has (its data, its curves) is named on the page, which has all the rest.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mljax import main as program
from mljax import memory
from mljax.errors import UserError
from mljax.prediction_files import check_writable

if TYPE_CHECKING:
    from markupsafe import Markup

    from mljax.report.gather import RunData

FILE = "report.html"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mljax.report",
        allow_abbrev=False,
        description="Write a page about a trained run, or several side by side.",
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", action="append", help="repeatable")
    add("--output", metavar="FILE", help=f"default: {FILE} in the first DIR")
    add("--root", metavar="FOLDER", help="of the data, if it is no longer where it was")
    add("--overwrite", action="store_true", help="replace a report that exists")
    return parser.parse_args(argv)


def run_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; where that is not enough, more parts."""
    names = [folder.name for folder in folders]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
    return names


def run(args: argparse.Namespace) -> None:
    folders = [Path(folder).absolute() for folder in args.workdir]
    if len(set(folders)) < len(folders):
        raise UserError("--workdir: the same directory is named twice")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--workdir {folder}: there is no such directory")
    output = Path(args.output) if args.output else folders[0] / FILE
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory; name a file")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output}: exists; name another --output, or add --overwrite")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    check_writable("--output", output)
    from mljax import workdir

    for folder in folders:
        workdir.read_config(folder)  # a mistake is found before the work
    program.quiet()
    from mljax import backend
    from mljax.report.gather import gather

    backend.set_up()
    names = run_names(folders)
    runs = [
        gather(name, folder, args.root, print)
        for name, folder in zip(names, folders, strict=True)
    ]
    workdir.write_text(output, make_page(runs))
    for made in runs:
        for line in made.missing:
            print(f"{made.name}: missing: {line}")
    print(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")


def make_page(runs: "Sequence[RunData]") -> str:
    """The HTML of one run, or of several side by side."""
    from mljax.report import own_sections, page, sections

    single = len(runs) == 1
    parts = [("Figures", sections.metrics(runs))]
    body = []
    if single:
        body.append(sections.summary(runs[0]))
    else:
        parts.append(("Settings that differ", sections.differences(runs)))
    body += [sections.missing(run) for run in runs]
    parts += [
        ("Training", sections.training(runs)),
        ("Labels", sections.labels(runs)),
        ("Precision and calibration", sections.precision_and_calibration(runs)),
    ]
    if single:
        parts += own_sections.sections(runs[0])
    else:
        each = page.joined(_one_of_several(run) for run in runs)
        parts.append(("Each run", each))
    there = [(title, content) for title, content in parts if content]
    body.append(page.navigation(title for title, _ in there))
    body += [page.section(title, content) for title, content in there]
    title = f"Report of {runs[0].name}" if single else f"{len(runs)} runs side by side"
    return page.page(title, body)


def _one_of_several(run: "RunData") -> "Markup":
    from mljax.report import own_sections, page, sections

    parts = [sections.summary(run)]
    for title, content in own_sections.sections(run):
        if content:
            parts += [page.heading(title), content]
    return page.details(run.name, page.joined(parts), "run")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see `mljax.main.command`."""
    return program.command(parse, run, argv)


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
