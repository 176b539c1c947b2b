"""Several processes, often one a machine, that train as one.

JAX's distributed service connects them and watches over them: when one dies it names
it and ends the others. What is added here: every process ends with the reason for
which one of them failed, at once and not after the service's timeout.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mljax.errors import (
    RESTART,
    Stopped,
    UserError,
    complain,
    exit_code,
    one_line,
)

_FAILED = "mljax/failed"
_SETTINGS = "mljax/settings"
_POLL = 1.0  # seconds between two looks at what the others report
_LONGER = 60  # seconds that JAX waits on, so that the reason is ours
_LAST_WORDS = 10.0  # seconds in which the others read why one failed


@contextlib.contextmanager
def together(
    args: argparse.Namespace, config: ConfigDict, settings: Mapping[str, Any]
) -> Iterator[None]:
    """Connects this process to the others for as long as it lasts.

    Does nothing where there are no others. Where there are, a failure of one ends
    them all, with its message and exit code 1.

    Args:
        args: mode, coordinator, num_processes, process_id, cluster: the command line.
        config: `config.hosts`.
        settings: what must be equal on all processes, as plain JSON.

    Raises:
        UserError: the others cannot be found, or have other settings.
        Stopped: not all have connected; another start may do better.
    """
    _start(args, config)
    if not jax.distributed.is_initialized() or _alone():
        if jax.distributed.is_initialized():  # which took SIGTERM, and tells nobody
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield
        return
    watcher = _Watcher()
    try:
        _check_same(settings, config.start_timeout)
        yield
    except BaseException as error:
        if not isinstance(error, Stopped):
            _fail(error, watcher, config)
        watcher.stop()
        jax.distributed.shutdown()
        raise
    watcher.stop()
    jax.distributed.shutdown()


def _alone() -> bool:
    """Whether there is one process. Ends this one where its devices do not start: the
    others learn of it by its silence, and it would wait for them."""
    try:
        return jax.process_count() == 1
    except RuntimeError as error:
        complain(f"error: {_short(error)}")
        os._exit(RESTART)


def gather(value: Any) -> list[Any]:
    """The `value` of every process, in their order. All must call it.

    value: plain JSON.
    """
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    # A power of two: few different lengths, few programs to compile.
    padded = np.zeros(1 << int(np.max(sizes)).bit_length(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:n].tobytes().decode())
        for row, n in zip(rows, sizes, strict=True)
    ]


def of_first(value: Any) -> Any:
    """The `value` of process 0 on all: for what they must not differ in."""
    return gather(value)[0]


def check_same(key: str, what: str, value: Any) -> None:
    """Raises UserError on all processes where `value` (plain JSON) is not that of
    process 0; `key` of the config is where it comes from, `what` its name."""
    found = gather([value, socket.gethostname()])
    off = [f"{i} ({name})" for i, (own, name) in enumerate(found) if own != found[0][0]]
    if off:
        raise UserError(
            f"{key}: process {', '.join(off[:5])} has other {what} than process 0 "
            f"({found[0][1]}); give all machines the same data"
        )


def wait(name: str) -> None:
    """Returns once all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def names() -> str:
    """ "0 tpu-a, 1 tpu-b": which process runs where."""
    found = gather(socket.gethostname())
    return ", ".join(f"{i} {name}" for i, name in enumerate(found))


def _start(args: argparse.Namespace, config: ConfigDict) -> None:
    given = _address(args)
    alone = os.environ.get("SLURM_NTASKS") == "1"
    if args.cluster == "none" or (args.cluster == "auto" and alone and not given):
        return
    # JAX's service takes SIGTERM, which `preemption` then acts upon.
    jax.config.update("jax_enable_preemption_service", args.mode == "train")
    method = None if args.cluster == "auto" else args.cluster
    if len(given) == 3:
        method = "deactivate"
    address = given.get("coordinator_address", "the address of process 0")
    late = (
        f"no connection of all processes at {address} within "
        f"config.hosts.start_timeout = {config.start_timeout} s"
    )
    hint = "is each of them running, and the port free?"
    try:
        with _ended_after(config.start_timeout, f"{late}: {hint}"):
            jax.distributed.initialize(
                **given,
                cluster_detection_method=method,
                initialization_timeout=config.start_timeout + _LONGER,
                heartbeat_timeout_seconds=config.heartbeat_timeout,
            )
    except Exception as error:  # those of what knows the others are of many kinds
        text, by_itself = str(error), not given and method is None
        is_fault = isinstance(error, RuntimeError | OSError)
        no_cluster = "coordinator_address" in text and not is_fault
        if by_itself and (no_cluster or _is_own_pod()):
            return _check_alone()  # an ordinary program
        if by_itself and "before any JAX calls" in text:
            return  # it has computed something already: it is alone
        if not is_fault:
            raise UserError(
                f"the other processes cannot be found ({_short(error)}): give "
                "--coordinator, --num-processes and --process-id, or --cluster=none"
            ) from error
        if "INVALID_ARGUMENT" in text:
            raise UserError(f"{late} ({_short(error)}): {hint}") from error
        # One died meanwhile, or what it held is not free yet.
        failed = f"error: no connection of all processes at {address}"
        raise Stopped(f"{failed} ({_short(error)}): {hint}", RESTART) from error


def _is_own_pod() -> bool:
    """Whether this is a pod of Kubernetes with no others: JAX takes every pod for one
    of an indexed job, where the package kubernetes is there."""
    in_group = {"JOB_COMPLETION_INDEX", "SLURM_JOB_ID"} & os.environ.keys()
    in_slice = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "KUBERNETES_SERVICE_HOST" in os.environ and not in_group and not in_slice


def _check_alone() -> None:
    """Raises UserError where MPI started several processes, of which JAX knows none:
    each would train alone, into the same work directory."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        size = os.environ.get(name, "1")
        if size.isdigit() and int(size) > 1:
            raise UserError(
                f"{name}={size}, and JAX cannot find the other processes: give "
                f"--coordinator=HOST:PORT of the first one, --num-processes={size} and "
                "--process-id, or --cluster=none"
            )


@contextlib.contextmanager
def _ended_after(seconds: float, text: str) -> Iterator[None]:
    """Ends the process with one line if what is inside takes longer.

    JAX's client would end it too, but with a stack trace.
    """

    def end() -> None:
        complain(f"error: {text}")
        os._exit(RESTART)  # most likely one of them died

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _address(args: argparse.Namespace) -> dict[str, Any]:
    """What flags and environment say, under the names of JAX."""
    found = {
        "coordinator_address": args.coordinator,
        "num_processes": args.num_processes,
        "process_id": args.process_id,
    }
    variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    for name, variable in zip(found, variables, strict=True):
        text = os.environ.get(variable)
        if found[name] is None and text is not None:
            number = name != "coordinator_address"
            if number and not text.isdigit():
                raise UserError(f"{variable}={text}: must be a whole number")
            found[name] = int(text) if number else text
    given = {name: value for name, value in found.items() if value is not None}
    if "coordinator_address" in given:
        host, colon, port = given["coordinator_address"].rpartition(":")
        if not (host and colon and port.isdigit()):
            raise UserError(
                f"--coordinator {given['coordinator_address']}: must be HOST:PORT"
            )
    if len(given) == 3 and not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(
            f"--process-id {given['process_id']}: must be 0 to "
            f"{given['num_processes'] - 1}, with --num-processes "
            f"{given['num_processes']}"
        )
    return given


def _check_same(settings: Mapping[str, Any], timeout: int) -> None:
    """Raises UserError on a process that was started with other settings than 0."""
    client = _client()
    if jax.process_index() == 0:
        client.key_value_set(_SETTINGS, json.dumps(settings))
        return
    first = json.loads(client.blocking_key_value_get(_SETTINGS, 1000 * timeout))
    mine = json.loads(json.dumps(settings))
    for key in first.keys() | mine.keys():
        if first.get(key) != mine.get(key):
            raise UserError(
                f"{key} is {mine.get(key)!r} here and {first.get(key)!r} in process 0: "
                "start all processes with the same settings"
            )


class _Watcher:
    """A thread that looks for failures that other processes report.

    The main thread may be inside a collective operation that will never end.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(_POLL):
            try:
                found = _client().key_value_dir_get(_FAILED)
            except RuntimeError:  # the service is gone: JAX says so, and ends this
                return
            if found and not self._ended.is_set():
                _, value = found[0]
                code, _, message = value.partition(" ")
                complain(f"error: {message}")
                _leave(int(code))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def _fail(error: BaseException, watcher: _Watcher, config: ConfigDict) -> None:
    """Tells the others why this process ends, and ends it."""
    text = one_line(error)
    unknown = text is None and not isinstance(error, KeyboardInterrupt)
    if _is_of_jax(error) and (unknown or isinstance(error, UserError)):
        # Most likely because another process died or failed. If it failed the watcher
        # knows in a moment; if it died JAX will say which one, and ends this program.
        time.sleep(config.heartbeat_timeout + 2 * _LAST_WORDS)
    watcher.stop()
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted: the same command goes on from here"
    if text is None:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {_short(error)}"
    else:
        complain(f"error: {text}")
    with contextlib.suppress(RuntimeError):
        here = f"process {jax.process_index()} on {socket.gethostname()}"
        key = f"{_FAILED}/{jax.process_index()}"
        _client().key_value_set(key, f"{exit_code(error)} {here}: {text}")
    _leave(exit_code(error))


def _is_of_jax(error: BaseException | None) -> bool:
    """Whether it is, or came of, an error of a computation or of waiting for others."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _leave(code: int) -> None:
    """Ends this process. The others may hang: nothing that waits for them is run."""
    with contextlib.suppress(RuntimeError):
        # The service lives in process 0: it stays until all have read the message.
        _client().wait_at_barrier("mljax/leave", int(1000 * _LAST_WORDS))
        if jax.process_index() == 0:
            time.sleep(_POLL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _client() -> Any:
    # Orbax takes it from there too; there is no public name for it.
    from jax._src import distributed

    return distributed.global_state.client


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
