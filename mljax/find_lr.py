"""Finds a learning rate: `python -m mljax.find_lr --config FILE --workdir DIR`.

--method=range: the range test: a few hundred steps in which the learning rate grows
exponentially. A step is the run's own, with SAM where the run has it (the loss is then
that of the second pass); momentum is constant and there is no EMA.

--method=tpe: a few epochs with each of some learning rates, which Optuna's TPE chooses
(Bergstra et al. 2011). A trial is the run itself, only shorter, its schedule too; one
that is worse than the median of those before it is cut off. Needs the extra `search`.

DIR then holds learning_rate.json, which the run takes with
`--config.optim.lr_from=DIR`. If a search is stopped, the same command goes on: trials
with the one that was cut short, a range test from its start.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mljax import config as configs
from mljax import main as program
from mljax import memory, workdir
from mljax.errors import PIP, UserError

RESULT = "learning_rate.json"
LOCK = "search.json"  # not config.json: this is no work directory of a training run

# Flags that count something: the method they belong to, and what they are by default.
_COUNTS = {"steps": ("range", 300), "trials": ("tpe", 16), "epochs": ("tpe", 3)}
# Of the optimiser: what a learning rate does not depend on.
_SCHEDULE = {"lr", "lr_from", "schedule", "pct_start", "div_factor", "final_div_factor"}
_SCHEDULE |= {"cycle_momentum", "freeze_epochs", "accumulate"}
# How far --min and --max are from config.optim.lr unless they are given.
_REACH = {"range": 1000.0, "tpe": 10.0}


def resolve(
    config: ConfigDict, stored: ConfigDict | None = None
) -> tuple[ConfigDict, str]:
    """The config with the learning rate of `optim.lr_from`, and a line that says so.

    stored: the config of a run that goes on; it has that learning rate already.

    Raises:
        UserError: there is no result, or it was found for another optimisation, so that
            its number means something else here.
    """
    where = config.optim.lr_from
    if not where:
        return config, ""
    if stored is not None and stored.optim.lr_from == where:
        config = configs.from_dict(config.to_dict())
        config.optim.lr = stored.optim.lr
        return config, f"lr:      {stored.optim.lr:g}, as this run began"
    file = Path(where) / RESULT if Path(where).is_dir() else Path(where)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lr, method = float(found["lr"]), found["method"]
        there = configs.flatten(configs.from_dict(found["config"]))
    except FileNotFoundError:
        raise UserError(
            f"config.optim.lr_from = {where}: there is no {file}; a finished "
            "`python -m mljax.find_lr` writes it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"config.optim.lr_from = {file}: is not a result of mljax.find_lr "
            f"({type(error).__name__}: {error})"
        ) from None
    here = configs.flatten(config)
    keys = ["model.backbone", "model.head", "mutual.weight"]
    keys += [k for k in here if _matters(k, config.loss.name)]
    if _cycles(here) and _cycles(there):
        keys = [key for key in keys if key not in ("optim.momentum", "optim.b1")]
    if not config.optim.lr_reference_batch:  # which makes one lr of all batch sizes
        keys.append("batch_size")
    off = [
        f"{key} = {there[key]!r}, which is {here[key]!r} here"
        for key in keys
        if there[key] != here[key]
    ]
    if bool(there["init_from"]) != bool(here["init_from"]):
        start = {True: "pretrained weights", False: "random weights"}
        off.append(
            f"{start[bool(there['init_from'])]}, which are "
            f"{start[bool(here['init_from'])]} here (init_from)"
        )
    if off:
        raise UserError(
            f"config.optim.lr_from = {where}: found {lr:g} for {'; '.join(off)}; "
            "search again, or give a number yourself (--config.optim.lr=)"
        )
    config = configs.from_dict(config.to_dict())
    config.optim.lr = lr
    configs.validate(config, chosen=())
    return config, f"lr:      {lr:g}, found by {method} in {file.parent}"


def _matters(key: str, loss: str) -> bool:
    """Whether a setting of SAM, loss or optimiser changes what a learning rate does."""
    part, *rest = key.split(".")
    if part == "loss":
        return len(rest) == 1 or rest[0] == loss
    return part == "sam" or (part == "optim" and rest[0] not in _SCHEDULE)


def _cycles(flat: Mapping[str, Any]) -> bool:
    """Whether the schedule replaces the momentum."""
    return flat["optim.schedule"] == "one_cycle" and flat["optim.cycle_momentum"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = program.make_parser(
        "python -m mljax.find_lr", "Find a learning rate for a training run."
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="new or empty; of this search")
    add(
        "--method",
        choices=tuple(_REACH),
        default="range",
        help="the range test (default), or trials of a few epochs chosen by TPE",
    )
    reach = "config.optim.lr {0} 1000; with tpe {0} 10"
    add("--min", type=float, metavar="LR", help=f"default: {reach.format('/')}")
    add("--max", type=float, metavar="LR", help=f"default: {reach.format('*')}")
    for name, (method, default) in _COUNTS.items():
        what = "how long a trial is" if name == "epochs" else "how many"
        text = f"with {method}: {what} (default: {default})"
        add(f"--{name}", type=int, metavar="N", help=text)
    return program.parse_with(parser, argv)


def settings_of(args: argparse.Namespace, config: ConfigDict) -> dict[str, Any]:
    """The flags with their defaults, checked: method, min, max, and its counts."""
    reach = _REACH[args.method]
    found: dict[str, Any] = {
        "method": args.method,
        "min": config.optim.lr / reach if args.min is None else args.min,
        "max": config.optim.lr * reach if args.max is None else args.max,
    }
    if not 0 < found["min"] < found["max"] < float("inf"):
        raise UserError(
            f"--min={found['min']:g} --max={found['max']:g}: both must be above 0, and "
            "min below max"
        )
    for name, (method, default) in _COUNTS.items():
        value, least = getattr(args, name), 20 if name == "steps" else 1
        if method != args.method:
            if value is not None:
                raise UserError(f"--{name} does nothing with --method={args.method}")
            continue
        found[name] = default if value is None else value
        if found[name] < least:
            raise UserError(f"--{name}={value}: must be at least {least}")
    return found


def check_folder(path: str, settings: dict[str, Any], config: ConfigDict) -> Path:
    """The directory of a search, which may be new, or of this very search.

    Only the number of trials may have changed.

    Raises:
        UserError: it holds something else.
    """
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir {path}: is a file, not a directory")
    lock = folder / LOCK
    if lock.is_file():
        stored = _read(lock)
        before = configs.flatten(configs.from_dict(stored.pop("config")))
        before |= {f"--{key}": value for key, value in stored.items()}
        now = configs.flatten(config)
        now |= {f"--{k}": settings.get(k) for k in stored if k != "trials"}
        if changed := workdir.differences(before, now):
            raise UserError(
                f"--workdir {path}: holds another search ({changed}); name another "
                "directory, or use the same settings to continue it"
            )
    elif folder.is_dir() and any(not workdir.is_left(f) for f in folder.iterdir()):
        raise UserError(
            f"--workdir {path}: is not empty and holds no search; name a new or empty "
            "directory"
        )
    return folder


def run(args: argparse.Namespace) -> None:
    # The range test has no cycle, which replaces the momentum of a run.
    steady = args.method == "range"
    config = program.read_config(args, ("optim.momentum", "optim.b1") if steady else ())
    if config.optim.lr_from:
        raise UserError("config.optim.lr_from does nothing in a search: leave it out")
    settings = settings_of(args, config)
    folder = check_folder(args.workdir, settings, config)
    if _finished(folder, settings, args.workdir):
        return
    if args.method == "tpe" and importlib.util.find_spec("optuna") is None:
        raise UserError(
            f"--method=tpe needs Optuna: {PIP} optuna (the extra `search` of mljax), "
            "or use --method=range"
        )
    from mljax import lr_search  # late: what it imports takes seconds

    # All that can be wrong is found before the directory is touched.
    search = lr_search.prepare(config, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with workdir.Lock(args.workdir) as lock:
        lock.take()
        if lock.note:
            print(lock.note)
        check_folder(args.workdir, settings, config)  # another may have begun meanwhile
        if _finished(folder, settings, args.workdir):
            return
        stored = config.to_dict()
        _write(folder / LOCK, {**settings, "config": stored})
        if args.method == "range":
            found = lr_search.by_range(search, folder, settings)
        else:
            found = lr_search.by_trials(search, folder, settings, config.optim.lr)
        workdir.write_unreadable(folder, search.unreadable)
        found = {**settings, **found, "config": stored}
        _write(folder / RESULT, found)
    tell(found, args.workdir)


def _finished(folder: Path, settings: Mapping[str, Any], path: str) -> bool:
    """Whether there is nothing left to search; tells what was found then."""
    if not (folder / RESULT).is_file():
        return False
    found = _read(folder / RESULT)
    if settings.get("trials", 0) > found.get("trials", 0):
        return False
    print("this search is finished")
    tell(found, path)
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is not valid JSON ({error})") from error


def _write(file: Path, content: dict[str, Any]) -> None:
    workdir.write_text(file, json.dumps(content, indent=2) + "\n")


def tell(found: dict[str, Any], path: str) -> None:
    """What was found, and how a run uses it."""
    lr, low, high = found["lr"], found["min"], found["max"]
    if found["method"] == "range":
        tenth = found["lowest"] / 10
        print(f"suggested: {lr:g}, where the loss falls fastest")
        print(f"compare:   {tenth:.3g}, a tenth of where the loss is lowest")
        print(f"           {found['config']['optim']['lr']:g}, that of the config")
        files = "curve.png, curve.csv"
    else:
        print(
            f"best:      {lr:g}, mAP {100 * found['mAP']:.2f} on {found['judged_on']}"
        )
        # Within a tenth of the (logarithmic) range from one of its ends.
        for end, near in (
            ("max", lr > high * (low / high) ** 0.1),
            ("min", lr < low * (high / low) ** 0.1),
        ):
            if near:
                print(f"note:      this is near --{end}={found[end]:g}: look beyond it")
        files = "trials.png, trials.csv, study.db (Optuna's)"
    print(f"pictures:  {Path(path)}: {files}")
    print(f"use it:    --config.optim.lr_from={shlex.quote(path)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return program.exit_code(lambda: run(args))


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
