"""A folder of a search belongs to one search at a time; damage in it is one line."""

from functools import partial
from types import SimpleNamespace

import pytest
from test_find_lr import TRIALS, flags, last_line

from mljax import find_lr, lr_search, workdir


def test_a_second_search_is_refused(tmp_path, monkeypatch, capsys):
    """The first one's trial would be taken for one that died."""
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / ".curve.csv.part").write_text("")  # of a search that was killed
    monkeypatch.setattr(workdir, "Lock", partial(workdir.Lock, patience=0))
    monkeypatch.setattr(lr_search, "prepare", lambda *_: None)
    monkeypatch.setattr(lr_search, "by_range", lambda *_: pytest.fail("it began"))
    with workdir.Lock(str(folder)) as first:
        first.take()
        assert find_lr.main(flags(folder, "--method=range")) == 1
        assert "another run trains there" in capsys.readouterr().err
    assert {file.name for file in folder.iterdir()} == {".lock", ".curve.csv.part"}


def test_damaged_trials_are_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="--method=tpe needs pip install optuna")
    made = SimpleNamespace(chosen_on="val", sources=SimpleNamespace(holdout=None))
    search = SimpleNamespace(made=made, config=SimpleNamespace(seed=0), unreadable=())
    monkeypatch.setattr(lr_search, "prepare", lambda *_: search)
    monkeypatch.setattr(lr_search, "run_trial", lambda *_: pytest.fail("it began"))
    study, folder = b"of another program" * 100, tmp_path / "trials"

    def damage(*args):
        (folder / lr_search.STUDY).write_bytes(study)
        return by_trials(*args)

    by_trials = lr_search.by_trials
    monkeypatch.setattr(lr_search, "by_trials", damage)
    assert find_lr.main(flags(folder, *TRIALS)) == 1
    line = last_line(capsys.readouterr().err)
    assert f"{folder / lr_search.STUDY}: the trials cannot be read" in line
    assert "not a database" in line and "delete this file to begin anew" in line
    assert (folder / lr_search.STUDY).read_bytes() == study
