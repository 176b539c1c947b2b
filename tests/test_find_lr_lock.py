"""A folder of a search belongs to one search at a time."""

from functools import partial

import pytest
from test_find_lr import flags

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
