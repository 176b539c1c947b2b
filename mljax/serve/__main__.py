"""Serve an exported model: `python -m mljax.serve --model model.onnx`.

    curl -F image=@one.jpg -F image=@two.jpg http://127.0.0.1:8080/predict

PATH is what `python -m mljax.export` wrote, in any of its formats. What a client names
is never opened or fetched. There is no TLS and no password: for other machines than
this one, put a proxy in front that has both.
"""

import argparse
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mljax import main as program
from mljax import memory
from mljax.errors import PIP, UserError

if TYPE_CHECKING:
    import uvicorn

    from mljax.serve.app import Service

# Seconds for requests that are in work when the server is asked to stop. Kubernetes
# gives a program 30.
_GRACE = 25


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mljax.serve",
        allow_abbrev=False,
        description="Serve an exported model over HTTP: POST /predict, GET /labels, "
        "/health, /metrics.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="what mljax.export wrote")
    add(
        "--host",
        default="127.0.0.1",
        help="default: 127.0.0.1, this machine only; 0.0.0.0: every address",
    )
    add("--port", type=int, default=8080, help="default: 8080; 0: any free one")
    add(
        "--max-batch",
        type=int,
        default=32,
        metavar="N",
        help="images computed together (default: 32)",
    )
    add(
        "--max-wait-ms",
        type=float,
        default=5.0,
        metavar="MS",
        help="that an image waits for others (default: 5)",
    )
    add(
        "--max-queue",
        type=int,
        default=128,
        metavar="N",
        help="images in work and waiting; more are answered with 503 (default: 128)",
    )
    add(
        "--max-mb",
        type=float,
        default=10.0,
        metavar="MB",
        help="of a request (default: 10)",
    )
    add(
        "--max-megapixels",
        type=float,
        default=25.0,
        metavar="MP",
        help="of a picture (default: 25); decoding takes 15 MB of memory for each",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    _check(args)
    _require()
    program.quiet()
    place = _bind(args.host, args.port)
    from mljax import backend, export, images
    from mljax.serve.app import Limits, Service

    # It tells of every malformed body, and the client is told already.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    backend.set_up()
    model = export.load(args.model, args.max_batch)
    limits = Limits(
        max_wait=args.max_wait_ms / 1e3,
        max_queue=args.max_queue,
        max_bytes=int(args.max_mb * 1e6),
        max_pixels=int(args.max_megapixels * 1e6),
    )

    def stop() -> None:
        server.should_exit = True

    service = Service(model, limits, stop)
    server = server_of(service)
    height, width = images.sides_of(model.config.data)
    host, port = place.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(
        f"model:   {args.model}, {len(model.class_names)} classes, {height} x {width}"
    )
    print(f"serving: http://{host}:{port}, warming up ...", flush=True)
    # uvicorn answers what it took, and then sends itself the signal once more.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[place])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is compiled yet may take long
    if service.failure is not None:
        raise service.failure
    print("stopped")


def server_of(service: "Service") -> "uvicorn.Server":
    import uvicorn

    from mljax.serve.connections import Connection

    return uvicorn.Server(
        uvicorn.Config(
            service.app,
            http=Connection,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
    )


def _check(args: argparse.Namespace) -> None:
    least = {
        "--port": (args.port, 0),
        "--max-batch": (args.max_batch, 1),
        "--max-wait-ms": (args.max_wait_ms, 0),
        "--max-queue": (args.max_queue, args.max_batch),
        "--max-mb": (args.max_mb, 1e-3),
        "--max-megapixels": (args.max_megapixels, 1e-3),
    }
    for flag, (given, lowest) in least.items():
        if not lowest <= given < float("inf"):
            more = " (--max-batch)" if flag == "--max-queue" else ""
            raise UserError(f"{flag} {given}: must be at least {lowest}{more}")
    if args.port > 65535:
        raise UserError(f"--port {args.port}: must be at most 65535")


def _require() -> None:
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error}: serving needs more packages: {PIP} '.[serve]' in the "
            "folder of mljax"
        ) from None


def _bind(host: str, port: int) -> socket.socket:
    """An address that is this program's, and does not listen yet."""
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot serve there ({error.strerror}); "
            "choose another"
        ) from None
    return place


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see `mljax.main.command`."""
    return program.command(parse, run, argv)


if __name__ == "__main__":
    memory.restart_tuned()
    sys.exit(main())
