"""From outputs to labels: the thresholds and the calibration kept with a checkpoint.

They are in `thresholds.json` inside the saved step, beside what Orbax wrote, so that
they are copied and deleted with it. `python -m mljax.thresholds` makes the file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mljax import workdir
from mljax.calibration import Calibration
from mljax.errors import UserError

if TYPE_CHECKING:
    import jax
    from jax.typing import ArrayLike

FILE = "thresholds.json"
FORMAT = 1  # raised when older code could not read the file
DEFAULT = 0.5


class Decision(NamedTuple):
    """How the outputs of a model become probabilities and labels.

    Attributes:
        thresholds: float32 [num_classes]; a label is said above it.
        calibration: what is done to the logits, or None.
        about: how both were chosen, for people; empty by default.
    """

    thresholds: np.ndarray
    calibration: Calibration | None
    about: Mapping[str, Any]


def default(num_classes: int) -> Decision:
    """0.5 for every class, and no calibration."""
    return Decision(np.full(num_classes, DEFAULT, np.float32), None, {})


def probabilities(
    outputs: "ArrayLike",
    loss_config: Mapping[str, Any],
    calibration: Calibration | None,
) -> "jax.Array":
    """`losses.probabilities`, calibrated; [..., num_classes], traceable."""
    import jax  # here: `--help` of the programs has no use for it

    from mljax import losses

    logits = losses.logits(outputs, loss_config)
    if calibration is not None:
        logits = calibration.scale * logits + calibration.bias
    return jax.nn.sigmoid(logits)


def load(step: Path, class_names: Sequence[str]) -> Decision:
    """What is kept with a saved step; `default` where nothing is.

    Raises:
        UserError: the file is damaged, of a newer version or of other classes.
    """
    file = step / FILE
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default(len(class_names))
    except ValueError as error:  # no JSON, or not even text
        raise _damaged(file, str(error)) from None
    try:
        return from_json(stored, class_names)
    except UserError as error:
        raise _damaged(file, str(error)) from None


def save(step: Path, class_names: Sequence[str], decision: Decision) -> Path:
    """Writes the whole file or nothing; returns it."""
    file = step / FILE
    stored = to_json(class_names, decision)
    workdir.write_text(file, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    return file


def to_json(class_names: Sequence[str], decision: Decision) -> dict[str, Any]:
    """As it is stored: numbers by class name."""
    stored: dict[str, Any] = {"format": FORMAT, "chosen": dict(decision.about)}
    columns = {"thresholds": decision.thresholds}
    if decision.calibration is not None:
        columns |= decision.calibration._asdict()
    for name, column in columns.items():
        # The shortest digits that give the same float32 again.
        numbers = [float(str(x)) for x in column.astype(np.float32)]
        stored[name] = dict(zip(class_names, numbers, strict=True))
    return stored


def from_json(stored: Any, class_names: Sequence[str]) -> Decision:
    """Raises UserError if it is not what `to_json` makes for these classes."""
    if not isinstance(stored, dict) or not isinstance(stored.get("format"), int):
        raise UserError("is not a file of mljax.thresholds")
    if stored["format"] > FORMAT:
        raise UserError("was written by a newer mljax")
    chosen = stored.get("chosen")
    thresholds = _column(stored, "thresholds", class_names)
    if not ((thresholds >= 0) & (thresholds < 1)).all():
        raise UserError("its thresholds must be at least 0 and below 1")
    if "scale" not in stored:
        return Decision(thresholds, None, chosen if isinstance(chosen, dict) else {})
    scale, bias = (_column(stored, name, class_names) for name in ("scale", "bias"))
    if not (scale > 0).all():
        raise UserError("its scales must be above 0")
    return Decision(
        thresholds,
        Calibration(scale, bias),
        chosen if isinstance(chosen, dict) else {},
    )


def _column(stored: Mapping[str, Any], name: str, names: Sequence[str]) -> np.ndarray:
    column = stored.get(name)
    if not isinstance(column, dict) or set(column) != set(names):
        raise UserError(f"its {name} are not those of the {len(names)} classes")
    values = [column[c] for c in names]
    if not all(type(x) in (int, float) and np.isfinite(x) for x in values):
        raise UserError(f"its {name} must be numbers")
    return np.asarray(values, np.float32)


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file}: {reason}; delete it (then every threshold is {DEFAULT}), or make it "
        "again with python -m mljax.thresholds --overwrite"
    )
