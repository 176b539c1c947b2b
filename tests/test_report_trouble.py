"""The page of runs that went wrong somewhere, or are not at their end."""

import json
import shutil

import numpy as np
from test_report import NAMES, Reader, runs  # noqa: F401 (fixture)

from mljax import decision
from mljax.report import __main__ as report
from mljax.run import Run


def test_numbers_that_are_none_and_a_graph_cut_off(runs, tmp_path, monkeypatch):  # noqa: F811
    """An evaluation takes both, and so does its page."""
    _, two, _ = runs
    folder, output = tmp_path / "copy", tmp_path / "page.html"
    shutil.copytree(two, folder)
    graph = folder / "label_graph.npz"
    whole = graph.read_bytes()
    plain = Run.scores

    def scores(run, variants, source, check=None):
        found = plain(run, variants, source, check)["best"]
        outputs = np.array(found.outputs)
        outputs[0] = np.nan
        return {"best": found._replace(outputs=outputs)}

    monkeypatch.setattr(Run, "scores", scores)
    flags = [f"--workdir={folder}", f"--output={output}", "--overwrite"]
    for kept in (False, True):
        damaged = bytearray(whole if kept else whole[:200])
        damaged[100:150] = bytes(50)  # as a crash may leave it
        graph.write_bytes(damaged)
        if kept:
            kept_ones = decision.default(len(NAMES))
            decision.save(folder / "best" / "4", NAMES, kept_ones)
        assert report.main(flags) == 0
        text = output.read_text(encoding="utf-8")
        Reader(text)
        assert "Thresholds</h2>" in text and "label graph: " in text


def test_what_was_chosen_on_a_holdout_is_not_compared_with_val(runs, tmp_path):  # noqa: F811
    one, _, _ = runs
    folder, output = tmp_path / "copy", tmp_path / "page.html"
    shutil.copytree(one, folder)
    flags = [f"--workdir={folder}", f"--output={output}", "--overwrite"]
    summary = json.loads((folder / "metrics.json").read_text())
    for chosen_on, is_compared in (("val", True), ("a tenth of train", False)):
        summary["chosen_on"] = chosen_on
        (folder / "metrics.json").write_text(json.dumps(summary))
        assert report.main(flags) == 0
        text = output.read_text(encoding="utf-8")
        assert is_compared == ("no longer those of then" in text)
