"""The learning-rate search: its flags, its trials, its files, and who uses them."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT, environment, last_line

from mljax import config as configs
from mljax import find_lr, lr_search, optim, workdir
from mljax import main as program
from mljax.errors import UserError

TINY = [
    "--config=configs/shapes.py:debug",
    "--config.model.backbone=tiny",
    "--config.batch_size=16",
    "--config.data.num_train=64",
    "--config.data.num_val=32",
    "--config.sam.rho=0.05",
]
RANGE = ["--min=1e-4", "--max=100", "--steps=120"]
TRIALS = ["--method=tpe", "--trials=4", "--epochs=3"]


def flags(folder: Path | str, *arguments: str) -> list[str]:
    return [f"--workdir={folder}", *TINY, *arguments]


def start(cache: Path, *arguments: str) -> subprocess.Popen:
    """tests/tiny_program.py as a user would run the programs."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "tiny_program.py"), *arguments],
        cwd=ROOT,
        env=environment(cache) | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[Path, list[str]]:
    """A range test, a run that uses what it found, trials; and what they printed."""
    folder = tmp_path_factory.mktemp("search")
    use = [f"--config.optim.lr_from={folder / 'range'}", "--config.published_mAP=-1"]
    commands = ["find_lr", *flags(folder / "range", *RANGE), "+"]
    commands += ["main", *flags(folder / "run", *use)]
    if find_spec("optuna"):
        commands += ["+", "find_lr", *flags(folder / "trials", *TRIALS)]
    process = start(folder / "cache", *commands)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return folder, output.split("+\n")


# ------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_a_factor_is_a_learning_rate(name, schedule):
    from mljax import lr_search

    config = configs.common().optim
    config.name, config.schedule, config.lr_reference_batch = name, schedule, 24
    params = {
        "a": {"weight": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.ones(3)}
    }
    config.lr = 0.03
    direct = optim.make_optimizer(config, 12, 10, params)
    config.lr = 1.0
    scaled = lr_search.adjustable(optim.make_optimizer(config, 12, 10, params))
    one, other = direct.init(params), scaled.init(params)
    other["factor"] = np.float32(0.03)
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.sin(x + step), params)
        expected, one = direct.update(grads, one, params, step)
        found, other = scaled.update(grads, other, params, step)
        for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
            assert float(jnp.abs(a).max()) > 0
            np.testing.assert_allclose(b, a, rtol=2e-6)


# ---------------------------------------------------------------------------- mistakes


def test_flags_are_read_without_heavy_imports():
    code = (
        "import sys; from mljax import find_lr\n"
        "try: find_lr.parse(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'tensorflow', 'optuna', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"--method" in done.stdout


def settings(*arguments: str) -> dict:
    given = ["--config=configs/shapes.py", "--workdir=x", *arguments]
    return find_lr.settings_of(find_lr.parse(given), configs.load("configs/shapes.py"))


def test_defaults_follow_the_config():
    lr = configs.load("configs/shapes.py").optim.lr
    found = settings()
    assert found == dict(method="range", min=lr / 1000, max=lr * 1000, steps=300)
    found = settings("--method=tpe", "--trials=5", "--max=3")
    assert found == dict(method="tpe", min=lr / 10, max=3.0, trials=5, epochs=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min=1", "--max=0.1"], "--min=1 --max=0.1: both must be above 0, and min"),
        (["--min=0"], "must be above 0"),
        (["--max=nan"], "must be above 0"),
        (["--trials=5"], "--trials does nothing with --method=range"),
        (["--method=tpe", "--steps=50"], "--steps does nothing with --method=tpe"),
        (["--steps=5"], "--steps=5: must be at least 20"),
        (["--method=tpe", "--epochs=0"], "--epochs=0: must be at least 1"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(UserError) as error:
        settings(*arguments)
    assert message in str(error.value)


def test_missing_optuna_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(find_lr.importlib.util, "find_spec", lambda _: None)
    assert find_lr.main(flags(tmp_path / "x", *TRIALS)) == 1
    assert "pip install optuna" in last_line(capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a training run
    assert find_lr.main(flags(tmp_path)) == 1
    assert "is not empty and holds no search" in last_line(capsys.readouterr().err)
    assert contents(tmp_path) == {"config.json": b"{}"}


def test_two_sources_of_a_learning_rate(capsys):
    given = flags("x", "--config.optim.lr_from=y")
    assert program.main([*given, "--config.optim.lr=0.1"]) == 1
    assert "both give the learning rate" in last_line(capsys.readouterr().err)
    assert find_lr.main(given) == 1
    assert "does nothing in a search" in last_line(capsys.readouterr().err)


# --------------------------------------------------------------------- what was found


def stored(folder: Path, config, **result) -> None:
    content = {"lr": 0.0123, "method": "tpe", "config": config.to_dict(), **result}
    (folder / "learning_rate.json").write_text(json.dumps(content))


def test_a_found_learning_rate_is_used(tmp_path):
    config = configs.load("configs/shapes.py")
    assert find_lr.resolve(config) == (config, "")
    stored(tmp_path, config)
    config.epochs, config.data.image_size = 99, 128  # may differ
    for where in (tmp_path, tmp_path / "learning_rate.json"):
        config.optim.lr_from = str(where)
        used, line = find_lr.resolve(config)
        assert used.optim.lr == 0.0123 and used.epochs == 99
        assert "0.0123" in line and str(tmp_path) in line
    assert config.optim.lr == 0.01  # the caller's own is left alone


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 32),
        ("optim.name", "adamw"),
        ("optim.lr_reference_batch", 256),
        ("loss.name", "asl"),
        ("loss.reduction", "mean"),
        ("loss.aam.scale", 23.0),
        ("sam.rho", 0.05),
        ("sam.every_steps", 5),
        ("sam.adaptive", True),
        ("sam.update_stats", "first"),
        ("loss.class_weights", "weights.json"),
        ("loss.label_smoothing", 0.2),
        ("optim.nesterov", True),
        ("optim.decay_bias_and_norm", True),
        ("model.backbone", "resnet50"),
        ("model.head", "gcn"),
        ("optim.weight_decay", 0.1),
        ("optim.bias_lr_factor", 1.0),
        ("optim.clip_norm", 0.5),
    ],
)
def test_a_learning_rate_of_another_run_is_refused(tmp_path, key, value):
    config = configs.load("configs/shapes.py")
    stored(tmp_path, config)
    configs.override(config, key, str(value))
    config.optim.lr_from = str(tmp_path)
    with pytest.raises(UserError) as error:
        find_lr.resolve(config)
    text = str(error.value)
    assert f"{key} = " in text and f"is {value!r} here" in text and "\n" not in text


def test_what_a_learning_rate_does_not_depend_on_may_differ(tmp_path):
    config = configs.load("configs/shapes.py")
    stored(tmp_path, config)
    config.optim.pct_start, config.optim.accumulate = 0.5, 2
    config.optim.div_factor = config.optim.final_div_factor = 3.0
    config.optim.lr_from, config.epochs, config.ema.decay = str(tmp_path), 7, 0.5
    config.loss.asl.gamma_neg = 2.0
    assert find_lr.resolve(config)[0].optim.lr == 0.0123


def test_trials_are_long_enough_to_thaw():
    config = configs.load("configs/shapes.py")
    config.epochs, config.optim.freeze, config.optim.freeze_epochs = 20, "backbone", 3
    with pytest.raises(UserError, match=r"--epochs=3: must be above .*epochs = 3"):
        lr_search.prepare(config, {"method": "tpe", "epochs": 3})


def test_a_learning_rate_of_random_weights_is_for_random_weights(tmp_path):
    config = configs.load("configs/shapes.py")
    stored(tmp_path, config)
    config.optim.lr_from, config.init_from = str(tmp_path), "weights.safetensors"
    with pytest.raises(UserError, match="random weights, which are pretrained weights"):
        find_lr.resolve(config)


def test_momentum_counts_where_the_schedule_leaves_it(tmp_path):
    config = configs.load("configs/shapes.py")
    config.optim.name, config.optim.cycle_momentum = "sgd", True
    stored(tmp_path, config)
    config.optim.lr_from, config.optim.momentum = str(tmp_path), 0.5
    assert find_lr.resolve(config)[0].optim.momentum == 0.5
    config.optim.momentum, config.optim.cycle_momentum = 0.9, False
    stored(tmp_path, config)
    config.optim.momentum = 0.5
    with pytest.raises(UserError, match="optim.momentum = 0.9, which is 0.5 here"):
        find_lr.resolve(config)


def test_with_a_reference_batch_the_batch_size_may_differ(tmp_path):
    config = configs.load("configs/shapes.py")
    config.optim.lr_reference_batch = 64
    stored(tmp_path, config)
    config.batch_size, config.optim.lr_from = 128, str(tmp_path)
    assert find_lr.resolve(config)[0].optim.lr == 0.0123


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no .*learning_rate.json"),
        ("{", "is not a result"),
        ("[]", "is not a result"),
        ('{"lr": 1}', "is not a result"),
        ('{"lr": -1, "method": "tpe", "config": {}}', r"optim\.lr = -1\.0: must be ab"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text, message):
    file = tmp_path / "learning_rate.json"
    if text is not None:
        file.write_text(text)
    config = configs.common()
    config.data.root, config.optim.lr_from = "x", str(file)
    with pytest.raises(UserError, match=message):
        find_lr.resolve(config)


# -------------------------------------------------------------------------- end to end


def test_range_test_end_to_end(searched):
    folder, output = searched[0] / "range", searched[1][0]
    names = {"search.json", "curve.csv", "curve.png", "learning_rate.json", ".lock"}
    assert {p.name for p in folder.iterdir()} == names
    found = json.loads((folder / "learning_rate.json").read_text())
    rows = (folder / "curve.csv").read_text().splitlines()[1:]
    lrs, losses = zip(*(map(float, r.split(",")[:2]) for r in rows), strict=True)
    assert 20 < len(rows) <= 120 and lrs[0] == 1e-4 and min(losses) > 0
    assert 1e-4 < found["lr"] < found["lowest"] < lrs[-1]
    assert found["config"]["optim"]["lr"] == 0.01  # of the run, not of the search
    assert f"suggested: {found['lr']:g}," in output
    assert f"--config.optim.lr_from={folder}" in output


def test_a_finished_search_is_kept(searched, capsys):
    folder = searched[0] / "range"
    before = contents(folder)
    assert find_lr.main(flags(folder, *RANGE)) == 0
    assert "this search is finished" in capsys.readouterr().out
    for changed, words in (
        ("--steps=100", "--steps was 120 and is now 100"),
        ("--config.seed=1", "seed was 0 and is now 1"),
    ):
        assert find_lr.main(flags(folder, *RANGE, changed)) == 1
        assert words in last_line(capsys.readouterr().err)
    assert contents(folder) == before


def test_the_next_run_uses_what_was_found(searched):
    folder, output = searched[0], searched[1][1]
    lr = json.loads((folder / "range" / "learning_rate.json").read_text())["lr"]
    assert f"lr:      {lr:g}, found by range in {folder / 'range'}" in output
    assert "published for this recipe: no figure is known" in output
    config = workdir.read_config(folder / "run")
    assert config.optim.lr == lr and config.optim.lr_from == str(folder / "range")
    config.optim.lr_from = ""  # the number alone goes on, too
    workdir.open_for_training(str(folder / "run"), config)
    config.optim.lr = 2 * lr
    with pytest.raises(UserError, match="optim.lr was"):
        workdir.open_for_training(str(folder / "run"), config)


@pytest.mark.parametrize("name", ["plain", "what?now #1 50%"])
def test_trials(name, tmp_path):
    pytest.importorskip("optuna", reason="--method=tpe needs pip install optuna")
    from mljax.lr_search import Study

    tmp_path = tmp_path / name
    tmp_path.mkdir()
    study = Study(tmp_path, 1e-4, 1.0, seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]
    tried = []
    for _ in range(4):
        trial = study.ask(first=0.005)
        tried.append(trial.user_attrs["lr"])
        for epoch in (1, 2):
            trial.report(0.5 + epoch / 100, epoch)
            assert not trial.should_prune()
        study.tell(trial, "whole")
    assert tried[0] == 0.005 and len(set(tried)) == 4
    bad = study.ask(first=0.005)
    bad.report(0.1, 1)
    assert bad.should_prune()
    # Killed here: the next process tries the same again, then the next one.
    study = Study(tmp_path, 1e-4, 1.0, seed=0)
    again = study.ask(first=0.005)
    assert again.user_attrs["lr"] == bad.user_attrs["lr"] not in tried
    again.report(0.1, 1)
    study.tell(again, "cut off")
    lost = study.ask(first=0.005)
    assert lost.user_attrs["lr"] not in [*tried, again.user_attrs["lr"]]
    study.tell(lost, "diverged")
    outcomes = [(t.outcome, t.best) for t in study.trials()]
    assert outcomes == [("whole", 0.52)] * 4 + [("cut off", 0.1), ("diverged", 0.0)]


def test_trials_end_to_end(searched):
    pytest.importorskip("optuna", reason="--method=tpe needs pip install optuna")
    folder, output = searched[0] / "trials", searched[1][2]
    assert "judged on val; data.holdout" in output
    names = {"search.json", "study.db", "trials.csv", "trials.png", ".lock"}
    assert {p.name for p in folder.iterdir()} == names | {"learning_rate.json"}
    found = json.loads((folder / "learning_rate.json").read_text())
    rows = [r.split(",") for r in (folder / "trials.csv").read_text().splitlines()[1:]]
    best = max(rows, key=lambda row: max(map(float, row[2:])))
    assert len(rows) == 4 and rows[0][0] == "0.01"  # the config's own comes first
    assert found["lr"] == float(best[0]) and found["judged_on"] == "val"
    assert found["mAP"] == pytest.approx(max(map(float, best[2:])), abs=1e-6)


def test_a_killed_search_goes_on(searched, tmp_path):
    pytest.importorskip("optuna", reason="--method=tpe needs pip install optuna")
    folder = tmp_path / "trials"
    command = ["find_lr", *flags(folder, *TRIALS)]
    process, begun = start(searched[0] / "cache", *command), False
    for line in process.stdout:  # killed inside the second trial
        begun |= line.startswith("trial 2/4")
        if begun and "epoch 1" in line:
            process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len((folder / "trials.csv").read_text().splitlines()) == 2
    assert not (folder / "learning_rate.json").exists()
    process = start(searched[0] / "cache", *command)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "trial 1/4" not in output, errors
    for name in ("trials.csv", "learning_rate.json"):
        expected = (searched[0] / "trials" / name).read_bytes()
        assert (folder / name).read_bytes() == expected
