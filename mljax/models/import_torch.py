"""PyTorch weights in and out: names and layouts of timm and of torch's state dicts.

The attribute paths of our modules are timm's names, and the layers say which axes
they keep in another order (`torch_axes`), so this is a rename and a transpose.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mljax.errors import UserError
from mljax.models import Classifier
from mljax.models.layers import BatchNorm, Linear
from mljax.models.linear import LinearHead

_COUNTER = "num_batches_tracked"  # torch's BatchNorm counts steps; nothing reads it
_CLASSIFIERS = ("classifier.", "fc.", "head.")  # timm's names of a network's last layer


def load(module: nnx.Module, state_dict: Mapping[str, Any]) -> None:
    """Puts a PyTorch state dict into `module`, in place, in the module's own dtypes.

    Args:
      module: a backbone, a head or a whole Classifier (names then have no prefix).
      state_dict: name -> numpy, jax or torch array in PyTorch's layout.

    Raises UserError, one line with every missing, unexpected and misshapen tensor;
    the module is then unchanged.
    """
    wanted = _variables(module)
    _assign(wanted, _adapted(module, wanted, _arrays(state_dict)))


def load_pretrained(module: Classifier, state_dict: Mapping[str, Any]) -> list[str]:
    """Starts fine-tuning: loads what fits and returns a note on each thing left out.

    The backbone must be complete. A last layer of other shape is left as it is, and
    so are parts of the head that a pretrained network does not have (PReLU's weight,
    a decoder), except `conv_head`, which a head that has it needs. Tensors that are
    unknown or misshapen otherwise raise UserError as in `load`.
    """
    wanted, notes = _variables(module), []
    given = _adapted(module, wanted, _arrays(state_dict))
    for name in getattr(module.head, "from_data", ()):  # this run's, not the file's
        wanted.pop(name)
        given.pop(name, None)
    if _shapes(_last(wanted)) != _shapes(_last(given)):
        notes.append(
            f"the classifier was not loaded: the file has {_describe(_last(given))}, "
            f"the model {_describe(_last(wanted))}"
        )
        for group in (wanted, given):
            for name in _last(group):
                del group[name]
    for name in sorted(set(_variables(module.head)) & set(wanted) - set(given)):
        if not name.startswith("conv_head."):
            del wanted[name]
            notes.append(f"{name} is not in the file and starts anew")
    if not any(name.startswith("conv_head.") for name in wanted):
        unused = [name for name in given if name.startswith("conv_head.")]
        for name in unused:
            del given[name]
        if unused:
            notes.append("conv_head was not loaded: this head does not use it")
    _assign(wanted, given)
    return notes


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


def read_file(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array of a .safetensors file, or of a .pth / .pt file with torch.

    Nothing in the file is executed (torch reads with weights_only). Raises UserError
    for a file that is missing, damaged or of another kind, or if torch is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return _read_torch(path)
    raise UserError(f"weights {path}: the name must end in .safetensors, .pth or .pt")


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
        values = jnp.asarray(array.transpose(self.axes), self.variable[...].dtype)
        self.variable[...] = values


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
    """numpy arrays of whatever kind of arrays, the step counters left out."""

    def to_numpy(value: Any) -> np.ndarray:
        if hasattr(value, "detach"):  # torch; numpy has no bfloat16 for it
            value = value.detach().cpu()
            value = value.float() if value.element_size() < 4 else value
        return np.asarray(value)

    return {
        name: to_numpy(value)
        for name, value in state_dict.items()
        if name.rpartition(".")[2] != _COUNTER
    }


def _is_linear(head: nnx.Module) -> bool:
    """Whether this is timm's own last layer, up to the number of classes."""
    return isinstance(head, LinearHead) and isinstance(head.classifier, Linear)


def _adapted(
    module: nnx.Module, wanted: Mapping[str, Any], given: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`given` under our names: a backbone may have other forms of its weights to
    convert (`adapt`), and another name than "classifier" for timm's last layer.
    """
    backbone: Any = module.backbone if isinstance(module, Classifier) else module
    given = backbone.adapt(given) if hasattr(backbone, "adapt") else given
    if not isinstance(module, Classifier):
        return given
    if "act2.weight" not in wanted and not getattr(backbone, "head_hidden", 0):
        given.pop("act2.weight", None)  # the method's PyTorch code has it, unused
    name = getattr(backbone, "classifier", "classifier")
    if name == "classifier" or f"{name}.weight" in wanted:
        return given
    # That code also keeps timm's classifier, unused, beside its own.
    replaced = "classifier.weight" in given
    for part in ("weight", "bias"):
        value = given.pop(f"{name}.{part}", None)
        if value is not None and not replaced:
            given[f"classifier.{part}"] = value
    return given


def _assign(wanted: dict[str, _Stored], given: dict[str, np.ndarray]) -> None:
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} {list(given[name].shape)} instead of {list(stored.shape)}"
        for name, stored in wanted.items()
        if name in given and given[name].shape != stored.shape
    ]
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise UserError(f"the weights do not fit the model; {'; '.join(problems)}")
    for name, stored in wanted.items():
        stored.assign(given[name])


def _last(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in tensors.items() if n.startswith(_CLASSIFIERS)}


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _describe(tensors: Mapping[str, Any]) -> str:
    shapes = _shapes(tensors).items()
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes) or "none"


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"weights {path}: damaged or not a safetensors file ({reason})"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"weights {path}: reading .pth needs torch; pip install torch, or use the "
            ".safetensors file"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"weights {path}: damaged or not plain tensors ({reason})"
        ) from error
    for key in ("state_dict", "model"):  # where training scripts put it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise UserError(f"weights {path}: holds no state dict (names -> tensors)")
    return _arrays(content)
