"""How a process finds the others, and what it does where it cannot."""

import argparse
import contextlib

import pytest

from mljax import config as configs
from mljax import hosts
from mljax.errors import Stopped, UserError


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "here"}, "HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "must be 0 to 1"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2}, "--process-id"),
        ({"cluster": "slurm"}, "--cluster=none"),
    ],
)
def test_wrong_addresses(flags, words, monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    config = configs.common().hosts
    args = argparse.Namespace(
        **{
            "coordinator": None,
            "num_processes": None,
            "process_id": None,
            "cluster": "auto",
            "mode": "eval",
        }
        | flags
    )
    # The tests have started JAX already; that comes after these checks.
    monkeypatch.setattr(hosts.jax._src.xla_bridge, "_backends", {})
    with pytest.raises(UserError, match=words), hosts.together(args, config, {}):
        pass


def test_devices_that_do_not_start(monkeypatch, capsys):
    """Among several processes: the others are not waited for."""

    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda': no device")

    class Ended(Exception):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(hosts, "_start", lambda *_: None)
    monkeypatch.setattr(hosts.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts.jax, "process_count", fail)
    monkeypatch.setattr(hosts.os, "_exit", leave)
    with (
        pytest.raises(Ended, match="75"),
        hosts.together(argparse.Namespace(), configs.common().hosts, {}),
    ):
        pass
    assert "Unable to initialize backend 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("UNAVAILABLE: Socket closed", Stopped),
        ("ABORTED: connected with a different incarnation", Stopped),
        ("INVALID_ARGUMENT: unexpected task", UserError),
    ],
)
def test_a_start_that_fails_is_tried_again(said, kind, monkeypatch):
    def fail(**_):
        raise RuntimeError(said)

    monkeypatch.setattr(hosts.jax.distributed, "initialize", fail)
    given = dict(coordinator="a:1", num_processes=2, process_id=0)
    args = argparse.Namespace(**given, cluster="auto", mode="eval")
    with (
        pytest.raises(kind, match=said) as failed,
        hosts.together(args, configs.common().hosts, {}),
    ):
        pass
    assert kind is UserError or failed.value.exit_code == 75


NOBODY = ValueError("coordinator_address should be defined.")


@pytest.mark.parametrize(
    ("variables", "error", "words"),
    [
        ({}, NOBODY, None),
        ({"PMI_SIZE": "1"}, NOBODY, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, NOBODY, "OMPI_COMM_WORLD_SIZE=4.*--process-id"),
        ({"PMI_SIZE": "2"}, NOBODY, "PMI_SIZE=2.*--num-processes=2"),
        # Where the package kubernetes is there, JAX takes every pod for one of a job.
        ({"KUBERNETES_SERVICE_HOST": "a"}, TypeError("None"), None),
        ({"KUBERNETES_SERVICE_HOST": "a"}, RuntimeError("Forbidden"), None),
        (
            {"KUBERNETES_SERVICE_HOST": "a", "PMI_SIZE": "4"},
            RuntimeError("Forbidden"),
            "PMI_SIZE=4",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "1"},
            TypeError("None"),
            "cannot be found.*--cluster=none",
        ),
    ],
)
def test_whether_it_is_alone(variables, error, words, monkeypatch):
    def fail(**_):
        raise error

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", fail)
    args = argparse.Namespace(
        coordinator=None,
        num_processes=None,
        process_id=None,
        cluster="auto",
        mode="eval",
    )
    expected = (
        pytest.raises(UserError, match=words) if words else contextlib.nullcontext()
    )
    with expected, hosts.together(args, configs.common().hosts, {}):
        pass
