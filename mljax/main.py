"""Train or evaluate: `python -m mljax.main --config configs/coco.py --workdir DIR`.

Heavy imports wait until the flags and the config are known to be right, so that
`--help` and a typing mistake answer at once.
"""

import argparse
import importlib.util
import io
import os
import sys
import types
import warnings
from collections.abc import Callable, Collection, Sequence

from ml_collections import ConfigDict

from mljax import config as configs
from mljax import errors, memory
from mljax.errors import Stopped, UserError, complain, one_line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        "python -m mljax.main", "Train or evaluate a multi-label image classifier."
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="checkpoints, logs and results"
    )
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    group = parser.add_argument_group(
        "several processes",
        "Found without flags on TPU pods and under Slurm and Open MPI; elsewhere give "
        "the first three, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID. See launch/README.md.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
    )
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    group.add_argument(
        "--cluster",
        choices=("auto", "none", "slurm", "ompi", "mpi4py"),
        default="auto",
        help="where the others are looked for; none: there are no others",
    )
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


def read_config(args: argparse.Namespace, acting: Collection[str] = ()) -> ConfigDict:
    """The config that the flags ask for, checked; and no word from TensorFlow.

    acting: settings that do something in a program though they would not in training.
    """
    # FILE may hold a colon of its own (a drive letter); ARG may not.
    path, colon, arg = args.config.rpartition(":")
    if not colon or os.path.isfile(args.config):
        path, arg = args.config, ""
    config = configs.load(path, arg)
    # What the file sets and a flag makes idle is no mistake.
    chosen = configs.idle(config)
    for key, value in args.overrides:
        configs.override(config, key, value)
        chosen.add(key)
    configs.validate(config, chosen.difference(acting))
    quiet()
    return config


def quiet() -> None:
    """Before TensorFlow, Orbax and PIL are used: they only say what goes wrong."""
    # Nor shall TensorFlow, which only decodes images here, announce oneDNN.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    from absl import logging

    # Orbax tells of one failed write in six tracebacks, and then raises it as well.
    logging.set_verbosity(logging.FATAL)
    # PIL of large pictures: data.max_pixels is the limit.
    bomb = "Image size .* could be decompression bomb"
    warnings.filterwarnings("ignore", bomb, RuntimeWarning)


def load_tensorflow() -> None:
    """Without Keras, which it imports on the way: a second, or two, for nothing."""
    found = importlib.util.find_spec("keras")
    if found is None or {"tensorflow", "keras"} & set(sys.modules):
        return
    # TensorFlow asks where Keras is, and does without what cannot be imported of it.
    sys.modules["keras"] = empty = types.ModuleType("keras")
    empty.__spec__ = found
    try:
        import tensorflow  # noqa: F401
    finally:
        del sys.modules["keras"]  # it is there for who asks for it later


def run(args: argparse.Namespace) -> None:
    config = read_config(args)
    if config.optim.lr_from and "optim.lr" in dict(args.overrides):
        raise UserError(
            "--config.optim.lr and config.optim.lr_from both give the learning rate: "
            "leave one out (--config.optim.lr_from= takes back that of a config file)"
        )
    if not args.workdir:
        raise UserError("--workdir is empty: name a directory (. is this one)")
    if "://" in args.workdir:
        raise UserError(
            f"--workdir {args.workdir}: must be a directory; mount the bucket, or use "
            "another file system that all machines share"
        )
    from mljax import backend, hosts

    backend.set_up()
    # The computers may differ in where the data is and how it is read, not in more.
    settings = {"--mode": args.mode, "--workdir": os.path.abspath(args.workdir)}
    for key, value in configs.flatten(config).items():
        if key not in ("data.root", "data.prefetch"):
            settings[f"config.{key}"] = value
    with hosts.together(args, config.hosts, settings):
        load_tensorflow()
        from mljax import evaluate_workdir, train

        if args.mode == "train":
            train.train(config, args.workdir)
        else:
            evaluate_workdir.evaluate_workdir(config, args.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run(args))


def command(
    parse: Callable[[Sequence[str]], argparse.Namespace],
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """One of the programs beside training, from its flags to its exit code.

    argv: without the program's name; None: those of the command line. Returns 0, 1 for
    an error, 130 when interrupted; wrong flags exit with 2.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run(args), interrupted="interrupted")


def exit_code(
    job: Callable[[], None],
    interrupted: str = "interrupted: the same command goes on from here",
) -> int:
    """Of a program whose flags are right: 0; 1 for an error; 130 when interrupted; and
    that of `Stopped`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The name of a file may hold bytes that cannot be printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        job()
    except Stopped as stopped:
        complain(str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt:
        complain(interrupted)
        return 130
    except Exception as error:
        if (text := one_line(error)) is None:
            raise
        complain(f"error: {text}")
        return errors.exit_code(error)
    return 0


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
