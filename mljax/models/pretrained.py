"""Weights of a model from elsewhere: `init_from`, and a checkpoint as a module."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mljax import checkpoint, losses
from mljax import config as configs
from mljax.errors import UserError
from mljax.models import Classifier, build_model, hub, import_torch, torch_files
from mljax.models.functional import split

Tree = dict[str, Any]


def load(
    init_from: str,
    make_model: Callable[[], Classifier],
    class_names: Sequence[str] = (),
) -> tuple[Tree, Tree, list[str]]:
    """Weights of `make_model()` with those of `init_from` in place.

    Args:
        init_from: a timm `.safetensors` or `.pth` file, `hf://OWNER/NAME`, a work
            directory, one saved step, or "" for random weights.
        make_model: builds the model with random weights.
        class_names: of this model. A classifier for as many others is not taken over,
            where the weights tell theirs.

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
    if init_from.startswith(hub.PREFIX):
        path = hub.fetch(init_from)
    elif path.is_dir():
        return _from_directory(path, model, class_names)
    try:
        weights = torch_files.read(path)
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    try:
        notes = import_torch.load_pretrained(
            model, weights.tensors, _are_others(weights.class_names, class_names)
        )
    except UserError as error:
        raise UserError(f"config.init_from = {init_from}: {error}") from error
    return *split(model), weights.notes + notes


def restore(
    path: str | Path, dtype: str | None = None
) -> tuple[Classifier, dict[str, Any]]:
    """The model of a work directory or one saved step, and its description.

    dtype: of its activations; None = that of its config.

    Raises:
        UserError: there is no checkpoint, or it holds a backbone without a classifier.
    """
    folder = checkpoint.find_best(Path(path).absolute())
    variables, about = checkpoint.load_variables(folder)
    try:
        config = configs.from_dict(about["config"])
    except UserError as error:
        raise _other_version(folder, error) from None
    if not about["class_names"]:
        raise UserError(
            f"{path}: holds a backbone without a classifier; a run can start from it "
            "(config.init_from)"
        )

    def make_model() -> Classifier:
        return build_model(
            config.model,
            len(about["class_names"]),
            angular=losses.is_angular(config.loss.name),
            dtype=jnp.dtype(dtype or config.dtype),
            rngs=nnx.Rngs(0),
        )

    try:
        made = nnx.eval_shape(make_model)
    except UserError as error:
        raise _other_version(folder, error) from None
    graph, *_ = nnx.split(made, nnx.Param, nnx.BatchStat)
    return nnx.merge(graph, variables["params"], variables["batch_stats"]), about


def _other_version(folder: Path, error: UserError) -> UserError:
    return UserError(
        f"{folder}: its config is of another version of mljax ({error}); use the one "
        "that trained it"
    )


def _are_others(given: Sequence[str] | None, wanted: Sequence[str]) -> bool:
    """Whether the weights tell their classes, and they are not those of the model."""
    if not given or not wanted:
        return False
    return list(given) != list(wanted)


def named_classes(about: Mapping[str, Any]) -> list[str] | None:
    """The classes of a checkpoint with this description; None: nobody has named them.

    `import_weights` counts those: "0", "1", ...
    """
    names = list(about.get("class_names", ()))
    if "imported_from" in about and names == [str(i) for i in range(len(names))]:
        return None
    return names


def _from_directory(
    path: Path, model: Classifier, class_names: Sequence[str]
) -> tuple[Tree, Tree, list[str]]:
    """As `load`, by the same rules as for a file (`import_torch.match`)."""
    try:
        found, about = checkpoint.load_variables(checkpoint.find_best(path.absolute()))
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    params, batch_stats = split(model)
    target = flatten_dict({"params": params, "batch_stats": batch_stats})
    places, given = _by_name(target), _by_name(flatten_dict(found))
    source = flatten_dict(found)
    head = {n for n, key in (places | given).items() if key[1] == "head"}
    try:
        names, notes = import_torch.match(
            {name: np.shape(target[key]) for name, key in places.items()},
            {name: np.shape(source[key]) for name, key in given.items()},
            head.__contains__,
            getattr(model.head, "from_data", ()),
            _are_others(named_classes(about), class_names),
        )
    except UserError as error:
        raise UserError(f"config.init_from = {path}: {error}") from error
    for name in names:
        target[places[name]] = source[given[name]]
    whole = unflatten_dict(target)
    return whole["params"], whole.get("batch_stats", {}), notes


def _by_name(flat: Mapping[tuple[str, ...], Any]) -> dict[str, tuple[str, ...]]:
    """("params", "backbone", "conv1", "weight") under "conv1.weight", as in a file."""
    return {".".join(key[2:]): key for key in flat}
