"""`python -m mljax.main --mode=eval`: the best weights of a work directory."""

import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mljax import compile_cache, evaluate, results, workdir
from mljax.checkpoint import find_best
from mljax.data import DATASETS
from mljax.run import check_names, make_run


def evaluate_workdir(config: ConfigDict, path: str) -> dict[str, Any]:
    """`--mode=eval`: the best weights of a work directory on val, to eval.json.

    Raises:
        UserError: there is no checkpoint, or its classes are not those of the data.
    """
    compile_cache.enable()
    check_names(config)
    folder = Path(path).absolute()
    best = find_best(folder)
    val = DATASETS[config.data.name](config.data, config.seed).val
    results.need_positives(val, "val")
    run = make_run(config, val.class_names)
    run, variables, about = results.best_weights(run, folder)
    workdir.check_same_classes(path, about, val.class_names)
    scores = run.scores({"best": variables}, val)
    report = evaluate.report(scores["best"], run.probabilities)
    per_class = report.pop("per_class")
    unreadable = evaluate.unreadable(scores, val.names)
    found = {
        **report,
        "step": int(best.name) if best.name.isdigit() else 0,  # 0: imported
        "unreadable": unreadable,
        "per_class": dict(zip(val.class_names, per_class, strict=True)),
    }
    workdir.write_text(folder / "eval.json", json.dumps(found, indent=2) + "\n")
    if jax.process_index() == 0:
        print(results.table(val.class_names, per_class, val, report))
        if unreadable:
            print(f"{len(unreadable)} images could not be read: see eval.json")
        print(f"weights of step {found['step']}; written to {folder / 'eval.json'}")
    return found
