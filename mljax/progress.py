"""What a run knows beside its arrays; kept in every checkpoint as plain JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mljax.early_stopping import EarlyStopping
from mljax.errors import UserError


@dataclass
class Progress:
    """Sums since the last evaluation, early stopping, and the best so far.

    Attributes:
        loss_sum, loss_steps: over the finite steps since the last evaluation.
        skipped: steps left out because a loss or gradient was not finite.
        skipped_in_row: how many of them up to now without a good one between.
        stopping: the state of early stopping.
        stopped: whether it has ended the run.
        best: the row of the best evaluation, with "weights" and "per_class".
        unreadable: names of images that could not be read.
    """

    loss_sum: float = 0.0
    loss_steps: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    stopping: EarlyStopping = EarlyStopping()
    stopped: bool = False
    best: dict[str, Any] | None = None
    unreadable: set[str] = field(default_factory=set)

    def take(self, metrics: Mapping[str, Any], max_bad_steps: int) -> None:
        """Adds the metrics of one step.

        Raises:
            UserError: `max_bad_steps` in a row were not finite.
        """
        if metrics["finite"]:
            self.loss_sum += float(metrics["loss"])
            self.loss_steps += 1
            self.skipped_in_row = 0
            return
        self.skipped += 1
        self.skipped_in_row += 1
        if self.skipped_in_row >= max_bad_steps:
            raise UserError(
                f"{self.skipped_in_row} steps in a row had a loss or gradient that is "
                "not finite (config.train.max_bad_steps): lower config.optim.lr, or "
                "set config.dtype to float32"
            )

    def end_of_epoch_loss(self) -> float | None:
        """The mean loss since the last call, None without a finite step."""
        mean = self.loss_sum / self.loss_steps if self.loss_steps else None
        self.loss_sum, self.loss_steps = 0.0, 0
        return mean

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "stopping": self.stopping.to_dict(),
            "unreadable": sorted(self.unreadable),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Progress":
        return cls(
            **{
                **values,
                "stopping": EarlyStopping.from_dict(values["stopping"]),
                "unreadable": set(values["unreadable"]),
            }
        )
