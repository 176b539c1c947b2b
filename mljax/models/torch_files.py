"""Files of PyTorch weights: .safetensors, and .pth where torch is installed.

Nothing in a file is executed: torch reads with `weights_only`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mljax import whole
from mljax.errors import PIP, UserError

# Where training scripts put the weights, best first. An average (EMA) is what they
# evaluate, and what timm itself loads.
KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model")
_TORCH = re.compile(r".*\.(pth|pt)(\.tar)?(-\d+)?")  # model.pth.tar-60: epoch 60


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: name -> array in PyTorch's layout.
        class_names: if the file tells them.
        notes: what else the user should know.
    """

    tensors: dict[str, np.ndarray]
    class_names: list[str] | None
    notes: list[str]


def read(path: str | Path, key: str = "") -> Weights:
    """The weights of a .safetensors file, or of a .pth / .pt file with torch.

    Args:
        path: the file.
        key: of a .pth file, where in it the weights are; "" = the first of `KEYS` that
            there is, else the file itself.

    Raises:
        UserError: the file is missing, damaged or of another kind, or torch is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        if key:
            raise UserError(f"--key {key}: {path} has no keys, it is one state dict")
        return _read_safetensors(path)
    if _TORCH.fullmatch(path.name):
        return _read_torch(path, key)
    raise UserError(
        f"weights {path}: the name must end in .safetensors, .pth, .pt or .pth.tar"
    )


def check_free(path: str | Path) -> Path:
    """Raises UserError unless `write` can make this file."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"{path}: the name must end in .safetensors, .pth or .pt")
    if path.exists():
        raise UserError(f"{path}: exists already; name another file")
    if path.suffix != ".safetensors":
        _torch(path)
    return path


def write(
    path: str | Path, tensors: Mapping[str, np.ndarray], class_names: list[str] | None
) -> None:
    """Writes a state dict that torch reads: a new .safetensors, .pth or .pt file.

    A .safetensors file also tells the class names, where there are any. Raises
    UserError as `check_free` does: the file exists or has another ending, or .pth
    needs torch.
    """
    path = check_free(path)
    arrays = {name: np.array(value, order="C") for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole.replacing(path) as part:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save

            about = {"format": "pt", "class_names": json.dumps(class_names)}
            part.write_bytes(save(arrays, metadata=about))
        else:
            torch = _torch(path)
            torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, part)


def to_numpy(value: Any) -> np.ndarray:
    """A numpy array of a numpy, jax or torch one; half types of torch as float32."""
    if hasattr(value, "detach"):  # torch; numpy has no bfloat16 for it
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()
    return np.asarray(value)


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
        names = json.loads(about.get("class_names", "null"))
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"weights {path}: damaged or not a safetensors file ({reason})"
        ) from error
    return Weights(tensors, _class_names(names), [])


def _read_torch(path: Path, key: str) -> Weights:
    torch = _torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"weights {path}: damaged or not plain tensors ({reason}); of a file that "
            "you trust, save the state dict alone with torch.save and use that"
        ) from error
    keys = []
    if isinstance(content, dict):
        keys = [k for k in KEYS if isinstance(content.get(k), dict)]
        if key and not isinstance(content.get(key), dict):
            raise UserError(
                f"--key {key}: {path} has {', '.join(keys) or 'one state dict only'}"
            )
    names = _class_names(content.get("classes_map")) if keys else None
    notes = []
    if keys:
        chosen = key or keys[0]
        content = content[chosen]
        others = ", ".join(k for k in keys if k != chosen)
        if others:
            notes.append(f"the weights are those under {chosen}; not read: {others}")
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise UserError(f"weights {path}: holds no state dict (names -> tensors)")
    return Weights({k: to_numpy(v) for k, v in content.items()}, names, notes)


def _class_names(stored: Any) -> list[str] | None:
    """A list of names; of the paper's implementation, which has {name: index}, too."""
    if isinstance(stored, dict) and sorted(map(str, stored.values())) == sorted(
        map(str, range(len(stored)))
    ):
        stored = sorted(stored, key=lambda name: int(stored[name]))
    if isinstance(stored, list) and stored:
        return [str(name) for name in stored]
    return None


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"weights {path}: .pth needs torch; {PIP} torch, or use a .safetensors file"
        ) from error
    return torch
