"""Train or evaluate: `python -m mljax.main --config configs/coco.py --workdir DIR`.

Heavy imports wait until the flags and the config are known to be right, so that
`--help` and a typing mistake answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from mljax import config as configs
from mljax import memory
from mljax.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        "python -m mljax.main", "Train or evaluate a multi-label image classifier."
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="checkpoints, logs and results"
    )
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    return parse_with(parser, argv)


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags by which every program finds its config."""
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description=description,
        epilog="--config.KEY=VALUE overrides one key, for example "
        "--config.optim.lr=0.01; configs/common.py lists them all.",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    return parser


def parse_with(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> argparse.Namespace:
    """Flags; what begins with `--config.` becomes `overrides`, a list of pairs."""
    args, rest = parser.parse_known_args(argv)
    args.overrides = []
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            parser.error(f"unknown flag {name} (settings are --config.KEY=VALUE)")
        if not equals:
            if not rest or rest[0].startswith("--"):
                parser.error(f"{name} needs a value: {name}=VALUE")
            value = rest.pop(0)
        args.overrides.append((name.removeprefix("--config."), value))
    return args


def read_config(args: argparse.Namespace) -> ConfigDict:
    """The config that the flags ask for, checked; and no word from TensorFlow."""
    # FILE may hold a colon of its own (a drive letter); ARG may not.
    path, colon, arg = args.config.rpartition(":")
    if not colon or os.path.isfile(args.config):
        path, arg = args.config, ""
    config = configs.load(path, arg)
    for key, value in args.overrides:
        configs.override(config, key, value)
    configs.validate(config)

    # TensorFlow only decodes images: no word from it, nor oneDNN, which it announces.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    from absl import logging

    # Orbax tells of one failed write in six tracebacks, and then raises it as well.
    logging.set_verbosity(logging.FATAL)
    return config


def run(args: argparse.Namespace) -> None:
    config = read_config(args)
    if config.optim.lr_from and "optim.lr" in dict(args.overrides):
        raise UserError(
            "--config.optim.lr and config.optim.lr_from both give the learning rate: "
            "leave one out (--config.optim.lr_from= takes back that of a config file)"
        )
    from mljax import train

    if args.mode == "train":
        train.train(config, args.workdir)
    else:
        train.evaluate_workdir(config, args.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run(args))


def exit_code(
    job: Callable[[], None],
    interrupted: str = "interrupted: the same command goes on from here",
) -> int:
    """Of a program whose flags are right: 0, 1 for an error, 130 when interrupted."""
    try:
        job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk, a folder without permission: the name and the reason suffice.
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # of XLA
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            "error: the device has too little memory: lower config.batch_size or "
            "config.data.image_size, raise config.optim.accumulate (a batch in parts), "
            "or set config.model.remat = true",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
