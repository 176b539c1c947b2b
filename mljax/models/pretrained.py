"""`init_from`: weights to start from, out of a file or a directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mljax import checkpoint
from mljax.errors import UserError
from mljax.models import Classifier, import_torch
from mljax.models.functional import split

Tree = dict[str, Any]


def load(
    init_from: str, make_model: Callable[[], Classifier]
) -> tuple[Tree, Tree, list[str]]:
    """Weights of `make_model()` with those of `init_from` in place.

    Args:
        init_from: a timm `.safetensors` or `.pth` file, a work directory, one saved
            step, or "" for random weights.
        make_model: builds the model with random weights.

    Returns:
        params and batch_stats as nested dicts, and a line for each thing that was not
        taken over (a classifier of other classes).

    Raises:
        UserError: no such file, or its tensors are not this model's: all are listed.
    """
    model = make_model()
    if not init_from:
        return *split(model), []
    path = Path(init_from)
    if not path.is_dir():
        notes = import_torch.load_pretrained(model, import_torch.read_file(path))
        return *split(model), notes
    variables, _ = checkpoint.load_variables(checkpoint.find_best(path))
    params, batch_stats = split(model)
    params, notes = _take(params, variables["params"], path, may_differ="head")
    found = variables["batch_stats"]
    for name in getattr(model.head, "from_data", ()):  # this run's, not the other's
        found.setdefault("head", {})[name] = batch_stats["head"][name]
    batch_stats, more = _take(batch_stats, found, path, may_differ="head")
    return params, batch_stats, notes + more


def _take(
    wanted: Tree, found: Tree, path: Path, may_differ: str
) -> tuple[Tree, list[str]]:
    """`found` in the structure of `wanted`; below `may_differ` what fits is taken."""
    target, source = flatten_dict(wanted), flatten_dict(found)
    problems: list[str] = []
    notes: list[str] = []
    for key in sorted(target.keys() | source.keys(), key=str):
        name = ".".join(map(str, key))
        if key not in source:
            problem = f"{name} is missing"
        elif key not in target:
            problem = f"{name} is not in the model"
        elif np.shape(source[key]) != np.shape(target[key]):
            problem = (
                f"{name} has shape {list(np.shape(source[key]))}, the model's has "
                f"{list(np.shape(target[key]))}"
            )
        else:
            target[key] = source[key]
            continue
        (notes if may_differ and key[0] == may_differ else problems).append(problem)
    if problems:
        raise UserError(
            f"config.init_from = {path}: its weights are of another model: "
            + "; ".join(problems)
        )
    return unflatten_dict(target), [f"left at random: {note}" for note in notes]
