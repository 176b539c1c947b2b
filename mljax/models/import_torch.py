"""PyTorch weights in and out: names and layouts of timm and of torch's state dicts.

The attribute paths of our modules are timm's names, and the layers say which axes
they keep in another order (`torch_axes`), so this is a rename and a transpose.
Checkpoints of the paper's PyTorch implementation have more names: `paper_names`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mljax.errors import UserError
from mljax.models import Classifier, paper_names, tresnet_abn
from mljax.models.batch_norm import BatchNorm
from mljax.models.layers import Linear
from mljax.models.linear import LinearHead
from mljax.models.torch_files import to_numpy

Shapes = Mapping[str, tuple[int, ...]]

_COUNTER = "num_batches_tracked"  # torch's BatchNorm counts steps; nothing reads it
# What has a part for each class: timm's last layers, and in our heads.
_CLASSIFIERS = (
    *("classifier.", "fc.", "head.", "class_vectors"),
    *("label_scores.", "query_embed.", "decoder.duplicate_pooling"),
)
# What names in heads begin with: in a file nothing else tells them from a backbone's.
_HEADS = {"classifier", "fc", "head", "conv_head", "act2", "A", "inp", "gc1", "gc2"}
_HEADS |= {"decoder", "encoder", "input_proj", "query_embed", "label_scores"}
_HEADS |= {"class_vectors"}


def load(module: nnx.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Puts a PyTorch state dict into `module`, in place, in the module's own dtypes.

    Args:
      module: a backbone, a head or a whole Classifier (names then have no prefix).
      state_dict: name -> numpy, jax or torch array in PyTorch's layout.

    Returns a note if there were tensors that the paper's implementation stores and
    does not use either.

    Raises UserError, one line with every missing, unexpected and misshapen tensor;
    the module is then unchanged.
    """
    wanted = _variables(module)
    given, notes = _adapted(module, wanted, _arrays(state_dict))
    target, source = _shapes(wanted), _shapes(given)
    _raise_unless_all_fit(target, source, [*target], [*source])
    for name, stored in wanted.items():
        stored.assign(given[name])
    return notes


def load_pretrained(
    module: Classifier, state_dict: Mapping[str, Any], other_classes: bool = False
) -> list[str]:
    """Starts fine-tuning: loads what `match` says and returns its notes.

    The module is unchanged if UserError is raised, as in `load`.
    """
    wanted = _variables(module)
    given, notes = _adapted(module, wanted, _arrays(state_dict))
    backbone, head = _variables(module.backbone), _variables(module.head)

    def in_head(name: str) -> bool:
        other = name.partition(".")[0] in _HEADS
        return name in head or (other and name not in backbone)

    own = getattr(module.head, "from_data", ())
    shapes = _shapes(wanted), _shapes(given)
    names, more = match(*shapes, in_head, own, other_classes)
    for name in names:
        wanted[name].assign(given[name])
    return notes + more


def match(
    wanted: Shapes,
    given: Shapes,
    in_head: Callable[[str], bool],
    own: tuple[str, ...],
    other_classes: bool = False,
) -> tuple[list[str], list[str]]:
    """Which tensors of `given` to start from, and a note on each thing left out.

    The backbone must be complete, but for the slopes of TResNet's PReLUs. A last layer
    of another kind or other classes is left as it is, and so are parts of the head that
    the other one does not have or has in another shape, except `conv_head`, which
    belongs to timm's last layer.

    Args:
      wanted: name -> shape of what the model has.
      given: name -> shape of the weights to start from.
      in_head: whether a tensor of this name belongs to a head.
      own: names that are never taken, because this run's data decides them.
      other_classes: the weights are for as many classes with other names, or in
        another order.

    Raises UserError, one line with every tensor that must fit and does not.
    """
    notes = []
    wanted = {name: shape for name, shape in wanted.items() if name not in own}
    given = {name: shape for name, shape in given.items() if name not in own}
    last, other = _last(wanted, in_head), _last(given, in_head)
    if last != other or other_classes:
        why = f"the weights have {_describe(other)}, the model {_describe(last)}"
        if last == other:
            why = "the weights are for other classes, or for these in another order"
        notes.append(f"the classifier was not loaded: {why}")
        wanted = {name: wanted[name] for name in wanted if name not in last}
        given = {name: given[name] for name in given if name not in other}
    of_timm = any(name.startswith("classifier.") for name in other)

    def may_differ(name: str) -> bool:
        if tresnet_abn.is_slope(name):
            return True
        return in_head(name) and not (of_timm and name.startswith("conv_head."))

    anew = [n for n in wanted if n not in given and may_differ(n)]
    slopes = {n for n in given if tresnet_abn.is_slope(n)}
    unused = [n for n in given if n not in wanted and (in_head(n) or n in slopes)]
    reshaped = [
        n for n in wanted if n in given and wanted[n] != given[n] and may_differ(n)
    ]
    for names, what in (
        (anew, "not in the weights, starts anew"),
        (reshaped, "of another shape in the weights, starts anew"),
        (unused, "in the weights, not used by this model"),
    ):
        if names:
            notes.append(f"{what}: {', '.join(names)}")
    needed = [n for n in wanted if n not in anew and n not in reshaped]
    known = [n for n in given if n not in unused and n not in reshaped]
    _raise_unless_all_fit(wanted, given, needed, known)
    return needed, notes


def export(module: nnx.Module) -> dict[str, np.ndarray]:
    """The state dict of `module` under PyTorch's names and layouts; undoes `load`."""
    state_dict = {
        name: variable.torch_array() for name, variable in _variables(module).items()
    }
    for path, layer in _layers(module):
        if isinstance(layer, BatchNorm):
            state_dict[".".join((*path, _COUNTER))] = np.zeros((), np.int64)
    if isinstance(module, Classifier) and _is_linear(module.head):
        backbone: Any = module.backbone
        for part in ("weight", "bias"):
            value = state_dict.pop(f"classifier.{part}")
            state_dict[f"{backbone.classifier}.{part}"] = value
    return state_dict


class _Stored:
    """A variable of a module, seen in PyTorch's layout."""

    def __init__(self, variable: nnx.Variable, axes: tuple[int, ...] | None):
        self.variable = variable
        self.axes = axes if axes is not None else tuple(range(variable[...].ndim))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.variable[...].shape
        return tuple(shape[i] for i in np.argsort(self.axes))

    def torch_array(self) -> np.ndarray:
        return np.asarray(self.variable[...]).transpose(np.argsort(self.axes))

    def assign(self, array: np.ndarray) -> None:
        # A copy of ours; jnp.asarray would compile a program for every shape.
        values = np.array(array.transpose(self.axes), self.variable[...].dtype)
        self.variable[...] = jax.device_put(values)


def _layers(module: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Module]]:
    """(path in torch's words, layer) of every layer, the module itself included."""
    skip = 1 if isinstance(module, Classifier) else 0  # "backbone" and "head"
    for path, layer in nnx.iter_modules(module):
        yield tuple(str(part) for part in path[skip:]), layer


def _variables(module: nnx.Module) -> dict[str, _Stored]:
    found = {}
    for path, layer in _layers(module):
        for name, value in vars(layer).items():
            if isinstance(value, nnx.Variable):
                axes = getattr(layer, "torch_axes", {}).get(name)
                found[".".join((*path, name))] = _Stored(value, axes)
    return found


def _arrays(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """numpy arrays of whatever kind of arrays, the step counters left out.

    Raises UserError for those that hold something else than finite numbers.
    """
    arrays = {
        name: to_numpy(value)
        for name, value in paper_names.without_prefixes(state_dict).items()
        if name.rpartition(".")[2] != _COUNTER
    }
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(
                f"the weights have {name} as {array.dtype}: only floating-point "
                "numbers can be taken, nothing quantised"
            )
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            finite = np.isfinite(array.astype(np.float32)).all()
        if not finite:
            raise UserError(f"the weights have NaN or infinity in {name}")
    return arrays


def _is_linear(head: nnx.Module) -> bool:
    """Whether this is timm's own last layer, up to the number of classes."""
    return isinstance(head, LinearHead) and isinstance(head.classifier, Linear)


def _adapted(
    module: nnx.Module, wanted: Mapping[str, Any], given: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """`given` under our names, and a note on what nobody uses.

    A backbone may have other forms of its weights to convert (`adapt`), and another
    name than "classifier" for timm's last layer.
    """
    backbone: Any = module.backbone if isinstance(module, Classifier) else module
    given = backbone.adapt(given) if hasattr(backbone, "adapt") else given
    if not isinstance(module, Classifier):
        return given, []
    name = getattr(backbone, "classifier", "classifier")
    if paper_names.head_of(given) != "linear":
        # Under these heads the paper's code keeps timm's last layers.
        unused = paper_names.unused(given, name, _variables(backbone))
        notes = [f"not used by the head: {', '.join(unused)}"] if unused else []
        return {n: given[n] for n in given if n not in unused}, notes
    if "act2.weight" not in wanted and not getattr(backbone, "head_hidden", 0):
        given.pop("act2.weight", None)  # the paper's code has it, unused
    if name == "classifier" or f"{name}.weight" in wanted:
        return given, []
    # That code also keeps timm's classifier, unused, beside its own.
    replaced = "classifier.weight" in given
    for part in ("weight", "bias"):
        value = given.pop(f"{name}.{part}", None)
        if value is not None and not replaced:
            given[f"classifier.{part}"] = value
    return given, []


def _raise_unless_all_fit(
    wanted: Shapes, given: Shapes, needed: list[str], known: list[str]
) -> None:
    """Raises UserError naming what is needed and absent, known and not wanted, or of
    another shape."""
    misshapen = [
        f"{name} {list(given[name])} instead of {list(wanted[name])}"
        for name in needed
        if name in given and given[name] != wanted[name]
    ]
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", [name for name in needed if name not in given]),
            ("unexpected", [name for name in known if name not in wanted]),
            ("wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise UserError(f"the weights do not fit the model; {'; '.join(problems)}")


def _last(tensors: Shapes, in_head: Callable[[str], bool]) -> Shapes:
    """The tensors of the layer that gives the scores."""
    return {
        name: shape
        for name, shape in tensors.items()
        if in_head(name) and name.startswith(_CLASSIFIERS)
    }


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _describe(shapes: Shapes) -> str:
    parts = (f"{name} {list(shape)}" for name, shape in shapes.items())
    return ", ".join(parts) or "none"
