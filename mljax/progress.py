"""What a run knows beside its arrays; kept in every checkpoint as plain JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from mljax.early_stopping import Decision, EarlyStopping
from mljax.errors import Temporary, UserError


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
        unreadable_in_row: steps without a single readable image, up to now.
        evaluation_due: whether the step it is saved with is still to be evaluated.
    """

    loss_sum: float = 0.0
    loss_steps: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    stopping: EarlyStopping = EarlyStopping()
    stopped: bool = False
    best: dict[str, Any] | None = None
    unreadable: set[str] = field(default_factory=set)
    evaluation_due: bool = False
    unreadable_in_row: int = 0

    def see(
        self, batch: Mapping[str, Any], names: Sequence[str], max_bad_steps: int
    ) -> None:
        """Notes which images of a training batch could not be read.

        Args:
            batch: of `data.pipeline.train_batches`.
            names: of the images of its source.
            max_bad_steps: steps in a row without a readable image that end the run.

        Raises:
            UserError: there were so many of them.
        """
        bad = [names[i] for i in batch["index"][~batch["ok"]]]
        self.unreadable.update(bad)
        if batch["ok"].any():
            self.unreadable_in_row = 0
            return
        self.unreadable_in_row += 1
        if self.unreadable_in_row >= max_bad_steps:
            raise Temporary(
                f"not one image of {self.unreadable_in_row} steps in a row could be "
                f"read (config.train.max_bad_steps), the last was {bad[-1]}: is its "
                "disk there? The same command goes on from the last checkpoint"
            )

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

    def decide(self, mean_ap: float, epoch: int, config: ConfigDict) -> Decision:
        """What follows from the evaluation after `epoch`, which had this mAP."""
        decision = self.stopping.update(
            mean_ap,
            patience=config.train.patience,
            warmed_up=epoch > warmup_epochs(config),
        )
        self.stopping, self.stopped = decision.state, decision.stop
        self.evaluation_due = False
        return decision

    def go_on(self, patience: int) -> None:
        """Lets a run that early stopping has ended go on where it has more patience."""
        best = self.best["mAP"] if self.best else 0.0
        if not self.stopped or self.stopping.ends(best, patience):
            return
        self.stopped = False
        # A perfect evaluation ends a run before it is noted here.
        highest = max(self.stopping.best, round(best, 4))
        self.stopping = self.stopping._replace(best=highest)

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


def warmup_epochs(config: ConfigDict) -> int:
    """In how many epochs early stopping does not wait yet: `train.warmup_epochs`, or
    those in which the learning rate rises or a part is frozen that will not stay so."""
    if config.train.warmup_epochs >= 0:
        return config.train.warmup_epochs
    optim = config.optim
    frozen = optim.freeze_epochs if optim.freeze else 0
    share = 0.0 if optim.schedule == "constant" else optim.pct_start
    return max(frozen, math.ceil(round(share * config.epochs, 6)))
