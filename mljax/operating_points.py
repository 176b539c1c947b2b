"""From which probability on a label is said: one threshold for each class. Numpy.

A label is predicted where its probability > its threshold, strictly. Labels are 1, 0
or -1 (not annotated: left out of everything).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mljax.calibration import fit
from mljax.metrics import checked


class Choice(NamedTuple):
    """Thresholds for probabilities of float32.

    Attributes:
        thresholds: float32 [num_classes], in [0, 1).
        overall: the one threshold that would be best for all classes together.
        reached: bool [num_classes]; whether the class's threshold gives the wanted
            precision or recall on these images, by their labels. True for F-beta and
            for a class without positives.
    """

    thresholds: np.ndarray
    overall: float
    reached: np.ndarray


def choose(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    beta: float = 1.0,
    precision: float | None = None,
    recall: float | None = None,
    shrink: float = 10.0,
) -> Choice:
    """The thresholds that are best on held-out images.

    Each is one of: the highest F-beta = (1 + beta^2) PR / (beta^2 P + R); the most
    recall with at least `precision`; the most precision with at least `recall`. It lies
    midway between two neighbouring probabilities.

    What is best for a few positives is mostly chance, so that two things lean on all
    classes, for one with P positives:
    - Its labels count P / (P + 100 shrink). The rest is what the probabilities
      themselves expect (as in the expected F-measure of Ye et al. 2012, arXiv
      1206.4625), calibrated by Platt scaling: P / (P + shrink) the class's own and
      the rest that of all classes as one.
    - Its threshold is P / (P + shrink) of its own and the rest of the overall one, in
      logits. Without positives it has the overall one.

    Args:
      probabilities: [num_images, num_classes], in [0, 1]; compared as float32.
      labels: [num_images, num_classes]; 1, 0 or -1 (ignored).
      beta: how many times recall counts as much as precision.
      precision, recall: in (0, 1]; wanted instead of F-beta, at most one of them.
      shrink: positives with which a threshold is half the class's own; with 0 labels
        alone decide, each class on its own.

    Raises:
      ValueError: arrays that do not fit, no positive at all, or an option out of range.
    """
    if precision is not None and recall is not None:
        raise ValueError("precision and recall: want only one of them")
    if not 0 < beta < np.inf:
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    for name, wanted in (("precision", precision), ("recall", recall)):
        if wanted is not None and not 0 < wanted <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {wanted}")
    if not 0 <= shrink < np.inf:
        raise ValueError(f"shrink must be at least 0 and finite, got {shrink}")
    p, y = checked("probabilities", probabilities, labels)
    p = p.astype(np.float32)
    if p.size and not (0 <= p.min() and p.max() <= 1):
        raise ValueError("probabilities must be in [0, 1]")
    if not (y == 1).any():
        raise ValueError("no class has a positive")

    positives = (y == 1).sum(0)
    share = positives / np.maximum(positives + 100 * shrink, 1e-12)
    counted = share * (y == 1) + (1 - share) * (
        _expected(p, y, shrink) if shrink else 0
    )

    def best(p: NDArray, y: NDArray, counted: NDArray) -> float:
        known = y != -1
        return _best(p[known], counted[known], beta, precision, recall)

    overall = best(p.ravel(), y.ravel(), counted.ravel())
    thresholds = np.full(p.shape[1], overall)
    for c in np.flatnonzero(positives):
        thresholds[c] = best(p[:, c], y[:, c], counted[:, c])
    share = positives / np.maximum(positives + shrink, 1e-12)
    both = share * _logit(thresholds) + (1 - share) * _logit(np.asarray(overall))
    exact = (share == 1) | (thresholds == overall)
    thresholds = np.where(exact, thresholds, 1 / (1 + np.exp(-both)))
    below_1 = np.nextafter(np.float32(1), np.float32(0))
    thresholds = np.minimum(thresholds.astype(np.float32), below_1)
    said = (p > thresholds) & (y != -1)
    true = (said & (y == 1)).sum(0)
    reached = np.ones(p.shape[1], bool)
    if precision is not None:
        reached = (true > 0) & (true >= (precision - 1e-12) * said.sum(0))
    elif recall is not None:
        reached = true >= (recall - 1e-12) * positives
    return Choice(thresholds, overall, reached | (positives == 0))


def _expected(p: NDArray, y: NDArray, shrink: float) -> NDArray:
    """Calibrated probabilities, or the labels if nothing can be calibrated."""
    logits = _logit(p.astype(np.float64))
    try:
        found = fit(logits, y, method="platt", per_class=True, shrink=shrink)
        return found.probabilities(logits)
    except ValueError:  # the scores do not rise with the labels
        return (y == 1).astype(np.float32)


def _best(
    p: NDArray,
    counted: NDArray,
    beta: float,
    precision: float | None,
    recall: float | None,
) -> float:
    """The threshold for probabilities p [n].

    counted [n]: how much of a positive each is, in [0, 1]. 0.5 where nothing can be
    chosen: all probabilities are 0.
    """
    order = np.argsort(-p, kind="stable")
    p, counted = p[order], counted[order]
    following = np.append(p[1:], np.float32(0))
    last = np.flatnonzero(p > following)  # of each group of equal ones; none at p = 0
    if not last.size:
        return 0.5
    true, said, positives = np.cumsum(counted)[last], last + 1, counted.sum()
    if precision is not None:
        quality = true / said
        enough = quality >= precision - 1e-12
        # The most recall; of those the first has the most precision.
        rank = np.where(enough, true, -1) if enough.any() else quality
    elif recall is not None:
        enough = true >= (recall - 1e-12) * positives
        rank = np.where(enough, true / said, -1.0) if enough.any() else true
    else:
        rank = true / (beta**2 * positives + said)
    i = int(np.argmax(rank))
    above, below = p[last[i]], following[last[i]]
    middle = np.float32((float(above) + float(below)) / 2)
    return float(middle if middle < above else below)


def _logit(p: NDArray) -> NDArray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))
