"""Which evaluation is the best so far, and when to stop."""

from collections.abc import Mapping
from typing import NamedTuple

# A metric that rounds to this or above cannot improve in any way that matters.
_PERFECT = 0.9999
_SMOOTHING = 0.8


class Decision(NamedTuple):
    """What follows from one evaluation."""

    state: "EarlyStopping"  # to go on with
    is_best: bool
    stop: bool


class EarlyStopping(NamedTuple):
    """The state of the rule; small and immutable, kept in checkpoints.

    The metric is compared with a running average of its improvements, so that a rise
    within the noise still counts as waiting.
    """

    smooth: float = 0.0  # metric, smoothed over the evaluations that improved
    wait: int = 0  # evaluations since it last improved
    best: float = 0.0  # highest metric, rounded to 4 digits

    def update(
        self, metric: float, *, patience: int, warmed_up: bool = True
    ) -> Decision:
        """Takes one evaluation into account.

        With `current` the metric rounded to 4 digits: within 1e-4 of 1, stop. Not above
        `smooth`: wait one more if warmed up, and stop once `patience` is reached. Else
        smooth = 0.8 metric + 0.2 smooth, wait = 0. Best is current >= best, so that
        among equals the last one counts.

        Args:
          metric: in [0, 1], higher = better: the mAP of the weights that count (see
            `better_weights`). NaN is never an improvement.
          patience: evaluations without improvement that end the run; 0 = never stop,
            not even at a perfect metric.
          warmed_up: False while waiting is not counted yet.

        Returns:
          The next state, whether this evaluation is the best, whether to stop.

        Raises:
          ValueError: a negative patience.

        References:
          Prokofiev & Sovrasov, arXiv 2209.06585: the rule of its implementation.
        """
        if patience < 0:
            raise ValueError(f"patience must be at least 0, got {patience}")
        metric = float(metric)
        current = round(metric, 4)
        if patience and current >= _PERFECT:
            return Decision(self, is_best=True, stop=True)
        is_best = current >= self.best
        state = self._replace(best=current) if is_best else self
        # Written so that NaN waits.
        if not current > self.smooth:
            state = state._replace(wait=self.wait + int(warmed_up))
            stop = warmed_up and 0 < patience <= state.wait
            return Decision(state, is_best, stop)
        # 1 - 0.8, not 0.2: they differ in the last bit.
        smooth = _SMOOTHING * metric + (1 - _SMOOTHING) * self.smooth
        return Decision(state._replace(smooth=smooth, wait=0), is_best, stop=False)

    def ends(self, metric: float, patience: int) -> bool:
        """Whether a run that has ended would have done so with this `patience`, too.

        metric: the highest so far.
        """
        perfect = round(metric, 4) >= _PERFECT
        return patience > 0 and (perfect or self.wait >= patience)

    def to_dict(self) -> dict[str, float]:
        """The state as plain numbers. Store them in double precision: the comparisons
        after a restore are then the same."""
        return {"smooth": self.smooth, "wait": float(self.wait), "best": self.best}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "EarlyStopping":
        """The inverse of `to_dict`.

        Raises:
          KeyError: a value is missing.
        """
        return cls(
            smooth=float(values["smooth"]),
            wait=int(values["wait"]),
            best=float(values["best"]),
        )


def better_weights(raw: float, ema: float | None = None) -> tuple[float, str]:
    """The metric that counts, and whose it is: "raw" or "ema".

    Args:
      raw: mAP of the weights being trained, in [0, 1].
      ema: mAP of their moving average, or None if there is none.

    Returns:
      The higher one and its name; a tie goes to "raw".
    """
    if ema is not None and ema > raw:
        return ema, "ema"
    return raw, "raw"
