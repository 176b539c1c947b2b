"""`python -m mljax.main --mode=eval`: the best weights of a work directory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mljax import backend, evaluate, hosts, results, tables, workdir
from mljax import config as configs
from mljax.checkpoint import describe, find_best
from mljax.data import DATASETS
from mljax.errors import UserError
from mljax.run import check_names, make_run
from mljax.terminal import nan_note


def evaluate_workdir(config: ConfigDict, path: str) -> dict[str, Any]:
    """`--mode=eval`: the best weights of a work directory on val, to eval.json.

    Raises:
        UserError: there is no checkpoint, or its classes are not those of the data, or
            its model is not that of the config.
    """
    backend.set_up()
    check_names(config)
    folder = Path(path).absolute()
    # Once: a run that goes on there may save another.
    best = Path(hosts.of_first(str(find_best(folder))))
    trained = describe(best)["config"]
    changed = _compare(config, trained, path)
    config = config.copy_and_resolve_references()
    # What an import found in the weights; recipes and flags need not know it.
    config.model.prelu = configs.from_dict(trained).model.prelu
    configs.without_step(config, jax.device_count())
    val = DATASETS[config.data.name](config.data, config.seed).val
    results.need_positives(val, "val")
    run = make_run(config, val.class_names)
    run, variables, about = results.best_weights(run, best)
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
    if jax.process_index() == 0:
        if changed:
            print(f"config:  {changed} (the run's own: {folder / workdir.CONFIG})")
        for note in val.notes:
            print(f"val:     {note}")
        print(results.table(val.class_names, per_class, val, report, "eval.json"))
        if count := report.get("nan_images"):
            print(nan_note(count))
        if unreadable:
            images = tables.count(len(unreadable), "image")
            print(f"{images} could not be read: see eval.json")
    # After the table, which is not lost where nothing can be written.
    workdir.write_text(folder / "eval.json", json.dumps(found, indent=2) + "\n")
    if jax.process_index() == 0:
        print(f"weights of step {found['step']}; written to {folder / 'eval.json'}")
    return found


def _compare(config: ConfigDict, trained: Mapping[str, Any], path: str) -> str:
    """What else is computed than in training; "" if nothing.

    Raises:
        UserError: the weights are of another model.
    """
    there = configs.flatten(configs.from_dict(trained))
    here = configs.flatten(config)
    head = f"model.{config.model.head}."
    ours = ("model.backbone", "model.head", "model.pool", "loss.name")

    def differing(wanted: Callable[[str], bool]) -> str:
        kept = {key: value for key, value in here.items() if wanted(key)}
        return workdir.differences({key: there[key] for key in kept}, kept)

    off = differing(
        lambda key: key in ours or (key.startswith(head) and "dropout" not in key)
    )
    if off:
        raise UserError(
            f"--workdir {path}: its weights are of another model ({off}); give the "
            "config that it was trained with"
        )
    inputs = ("image_size", "fit", "resize", "antialias", "scaled_decode")
    also = {f"data.{key}" for key in inputs} | {"eval.flip", "loss.aam.scale"}
    return differing(also.__contains__)
