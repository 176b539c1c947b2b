"""A work directory belongs to one config, and its files are whole or absent."""

import errno
import os
import threading
from pathlib import Path

import data_trees
import pytest

from mljax import config as configs
from mljax import workdir
from mljax.data import DATASETS
from mljax.errors import UserError

PID = os.getpid()


def test_new_empty_and_same_are_opened(tmp_path):
    config = configs.load("configs/shapes.py")
    folder = workdir.open_for_training(str(tmp_path / "a" / "b"), config)
    assert workdir.read_config(folder).to_dict() == config.to_dict()
    config.train.log_every += 1  # may change: it does not touch what is computed
    config.data.on_error = "skip"  # what the message about a broken image advises
    assert workdir.open_for_training(str(folder), config) == folder
    assert workdir.read_config(folder).data.on_error == "stop"  # not yet
    workdir.keep_config(folder, config)
    assert workdir.read_config(folder).to_dict() == config.to_dict()


def test_what_a_kill_leaves_of_the_first_file_is_no_other_run(tmp_path):
    config = configs.load("configs/shapes.py")
    (tmp_path / ".config.json.part").write_text("{")
    folder = workdir.open_for_training(str(tmp_path), config)
    assert workdir.read_config(folder).to_dict() == config.to_dict()


def test_another_config_is_refused_and_left_alone(tmp_path):
    config = configs.load("configs/shapes.py")
    folder = workdir.open_for_training(str(tmp_path / "run"), config)
    before = (folder / "config.json").read_text()
    config.optim.lr *= 2
    with pytest.raises(UserError, match=r"optim\.lr was .* and is now"):
        workdir.open_for_training(str(folder), config)
    assert (folder / "config.json").read_text() == before


def test_what_does_nothing_may_change(tmp_path):
    config = configs.load("configs/shapes.py")
    folder = str(tmp_path / "run")
    config.optim.momentum = 0.5  # which the cycle replaces
    workdir.open_for_training(folder, config)
    config.optim.momentum, config.loss.focal.gamma = 0.9, 1.0
    workdir.open_for_training(folder, config)
    config.optim.cycle_momentum = False
    with pytest.raises(UserError, match=r"optim\.cycle_momentum was True"):
        workdir.open_for_training(folder, config)


def begin(path, config, error, *made):
    """A run that makes these files and folders and ends with the error."""
    with pytest.raises(type(error)), workdir.Lock(path) as lock:
        lock.open_for_training(config)
        for name in made:
            file = Path(path) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text("")
        raise error


def test_a_mistake_before_the_first_result_leaves_no_trace(tmp_path):
    config = configs.load("configs/shapes.py")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    made = ("tensorboard/events", "label_graph.npz", "label_graph.png")
    begin(str(tmp_path), config, UserError("x"), *made)
    kept = {".lock", "checkpoints", "metrics.jsonl"}
    assert {file.name for file in tmp_path.iterdir()} == kept
    config.optim.lr *= 2
    begin(str(tmp_path), config, UserError("x"))  # other settings are welcome


def test_a_mistake_where_open_files_cannot_be_deleted(tmp_path, monkeypatch):
    """NFS keeps them, by another name, until the process has ended."""
    config = configs.load("configs/shapes.py")
    with monkeypatch.context() as patch:
        patch.setattr(workdir.shutil, "rmtree", lambda *_, **__: None)
        begin(str(tmp_path), config, UserError("x"), "tensorboard/.nfs01")
    (tmp_path / "tensorboard" / ".nfs01").unlink()
    config.optim.lr *= 2
    begin(str(tmp_path), config, UserError("x"))


def test_a_mistake_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(workdir.fcntl, "flock", refuse)
    begin(str(tmp_path), configs.load("configs/shapes.py"), UserError("x"))
    assert {file.name for file in tmp_path.iterdir()} == {".lock"}


def test_a_mistake_after_a_step_keeps_the_curves(tmp_path):
    config = configs.load("configs/shapes.py")
    with (
        pytest.raises(UserError, match="not finite"),
        workdir.Lock(str(tmp_path)) as lock,
    ):
        lock.open_for_training(config)
        (tmp_path / "tensorboard").mkdir()
        lock.keep()
        raise UserError("3 steps in a row had a loss that is not finite")
    assert (tmp_path / "tensorboard").exists() and (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("error", "made"),
    [
        (KeyboardInterrupt(), ()),  # which is no mistake
        (UserError("x"), ("best/1",)),
        (UserError("x"), ("thesis.tex",)),
    ],
)
def test_other_ends_keep_it_as_it_is(tmp_path, error, made):
    config = configs.load("configs/shapes.py")
    begin(str(tmp_path), config, error, "tensorboard/events", *made)
    begin(str(tmp_path), config, UserError("of the next start"))
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {".lock", "config.json", "tensorboard/events", *made}


def test_what_others_made_is_no_empty_directory(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    config = configs.load("configs/shapes.py")
    with pytest.raises(UserError, match="is not empty and holds no mljax run"):
        workdir.open_for_training(str(tmp_path), config)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    config = configs.load("configs/shapes.py")
    with pytest.raises(UserError, match="is not empty and holds no mljax run"):
        workdir.open_for_training(str(tmp_path), config)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        workdir.open_for_training(str(tmp_path / "thesis.tex"), config)


def test_history_is_cut_at_the_last_checkpoint(tmp_path):
    rows = [{"step": s, "mAP": s / 10} for s in (2, 4, 6)]
    workdir.write_history(tmp_path, rows)
    assert workdir.read_history(tmp_path, last_step=4) == rows[:2]
    assert workdir.read_history(tmp_path / "none", last_step=4) == []
    for folder, step in ((tmp_path / "none", 4), (tmp_path, 1)):
        with pytest.raises(UserError, match="metrics.jsonl: the evaluations .*missing"):
            workdir.read_history(folder, last_step=step, needed=True)


@pytest.mark.parametrize("text", ['{"step": 2}\n{"ste', "[1]\n", "{}\n", "\x80"])
def test_a_damaged_history_is_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="metrics.jsonl: is damaged .*: a line must"):
        workdir.read_history(tmp_path, last_step=4)


@pytest.mark.parametrize("text", ["{", "[1]", "\x80", ""])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json: is not the config of a run .*"):
        workdir.read_config(tmp_path)


def test_data_that_changed_is_refused(tmp_path):
    def about(root):
        train, val, _ = DATASETS["annotations"](data_trees.data_config(root), 0)
        return {
            "class_names": train.class_names,
            "num_train": len(train),
            "data": {
                "train images": train.fingerprint(),
                "val images": val.fingerprint(),
            },
        }

    data_trees.tree(tmp_path / "old")
    saved = about(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "moved")
    workdir.check_same_data("run", saved, about(tmp_path / "moved"))
    val = tmp_path / "moved" / "val.json"
    text = val.read_text()
    for old, new in (('["a", "b"]', '["a", "c"]'), ("val/3.png", "val/2.png")):
        assert old in text
        val.write_text(text.replace(old, new))
        changed = r"the val images \(labels or file names\) have changed"
        with pytest.raises(UserError, match=f"--workdir run: {changed}"):
            workdir.check_same_data("run", saved, about(tmp_path / "moved"))
    del saved["data"]  # a checkpoint of an older mljax
    workdir.check_same_data("run", saved, about(tmp_path / "moved"))
    with pytest.raises(UserError, match="trained on 9 images, the data now has 10"):
        workdir.check_same_data(
            "run", saved | {"num_train": 9}, about(tmp_path / "moved")
        )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "metrics.json"
    workdir.write_summary(tmp_path, {"mAP": 0.5})
    before = file.read_text()
    with pytest.raises(ValueError):
        workdir.write_summary(tmp_path, {"mAP": float("nan")})
    assert file.read_text() == before
    workdir.write_unreadable(tmp_path, {"b.jpg", "a.jpg"})
    assert (tmp_path / "unreadable.txt").read_text() == "a.jpg\nb.jpg\n"


def test_a_directory_in_which_another_run_trains_is_refused(tmp_path):
    config = configs.load("configs/shapes.py")
    with workdir.Lock(str(tmp_path)) as first:
        first.open_for_training(config)
        with (
            pytest.raises(UserError, match=f"another run trains there .process {PID} "),
            workdir.Lock(str(tmp_path), patience=0) as second,
        ):
            second.open_for_training(config)
        assert (tmp_path / "config.json").exists()
    with workdir.Lock(str(tmp_path), patience=0) as third:
        third.take()
        assert not third.note


def test_a_second_start_waits_for_the_first_to_end(tmp_path):
    """It may still be saving; or end with a mistake, and take its config back."""
    config, path = configs.load("configs/shapes.py"), str(tmp_path / "run")
    begun, waits, ended = threading.Event(), threading.Event(), []

    def hold():
        with pytest.raises(UserError, match="mine"), workdir.Lock(path) as first:
            first.open_for_training(config)
            begun.set()
            assert waits.wait(20)
            raise UserError("mine")
        ended.append(True)

    def refused(*arguments):
        waits.set()
        return flock(*arguments)

    flock = workdir.fcntl.flock
    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(20)
    with pytest.MonkeyPatch.context() as patch, workdir.Lock(path) as second:
        patch.setattr(workdir.fcntl, "flock", refused)
        second.open_for_training(config)
        holder.join(20)
        assert ended == [True] and not second.note
        assert (tmp_path / "run/config.json").exists()


def test_the_lock_of_a_machine_that_is_gone_stops_nobody(tmp_path, monkeypatch):
    with workdir.Lock(str(tmp_path)) as first:
        with monkeypatch.context() as patch:
            patch.setattr(workdir, "_machine", lambda: "another")
            first.take()
        with workdir.Lock(str(tmp_path), patience=0) as second:
            second.take()
            assert f"is locked by process {PID} on " in second.note


def test_no_lock_where_the_file_system_has_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", refuse)
    with workdir.Lock(str(tmp_path)) as lock:
        lock.take()
