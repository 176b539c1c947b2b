"""From which probability on a label is said: one threshold for each class. Numpy.

A label is predicted where its probability > its threshold, strictly. Labels are 1, 0
or -1 (not annotated: left out of everything).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mljax.calibration import blocks, fit
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
    Where that misses the wanted precision or recall on these images, a class with at
    least `shrink` positives has the threshold that its labels alone give, if any does.

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
    p = np.asarray(p, np.float32)
    if p.size and not (0 <= p.min() and p.max() <= 1):
        raise ValueError("probabilities must be in [0, 1]")
    positives = np.count_nonzero(y == 1, axis=0)
    if not positives.any():
        raise ValueError("no class has a positive")

    share: NDArray = np.ones(p.shape[1])
    expected = p  # counts for nothing then
    if shrink:
        share = positives / (positives + 100 * shrink)
        expected = _expected(p, y, shrink)

    def entries(part: Any, share: NDArray = share) -> NDArray:
        """The annotated entries of a part of the table, see `pack`."""
        known = y[part] != -1
        of_class = np.broadcast_to(share, y.shape)[part][known]
        counted = of_class * (y[part][known] == 1)
        return pack(p[part][known], counted + (1 - of_class) * expected[part][known])

    def reaches(classes: NDArray, thresholds: NDArray) -> NDArray:
        """Whether they give the wanted precision or recall, by the labels."""
        labels = y[:, classes]
        said = (p[:, classes] > thresholds) & (labels != -1)
        true = np.count_nonzero(said & (labels == 1), axis=0)
        if precision is not None:
            enough = (precision - 1e-12) * np.count_nonzero(said, axis=0)
            return (true > 0) & (true >= enough)
        return true >= ((recall or 0) - 1e-12) * positives[classes]

    criterion = beta, precision, recall
    every, length = np.empty(np.count_nonzero(y != -1), np.uint64), 0
    for rows in blocks(*y.shape):
        some = entries(rows)
        every[length : length + len(some)] = some
        length += len(some)
    overall = _best(every, *criterion)
    del every
    thresholds = np.full(p.shape[1], overall)
    for c in np.flatnonzero(positives):
        thresholds[c] = _best(entries((slice(None), c)), *criterion)
    share = positives / np.maximum(positives + shrink, 1e-12)
    both = share * _logit(thresholds) + (1 - share) * _logit(np.asarray(overall))
    exact = (share == 1) | (thresholds == overall)
    thresholds = np.where(exact, thresholds, 1 / (1 + np.exp(-both)))
    below_1 = np.nextafter(np.float32(1), np.float32(0))
    thresholds = np.minimum(thresholds.astype(np.float32), below_1)
    reached = np.ones(p.shape[1], bool)
    if precision is not None or recall is not None:
        reached = reaches(np.arange(p.shape[1]), thresholds)
        for c in np.flatnonzero(~reached & (positives >= max(shrink, 1))):
            found = _best(entries((slice(None), c), np.ones(1)), *criterion)
            alone = np.array([found], np.float32)
            if reaches(np.array([c]), alone)[0]:
                thresholds[c], reached[c] = alone[0], True
    return Choice(thresholds, overall, reached | (positives == 0))


def _expected(p: NDArray, y: NDArray, shrink: float) -> NDArray:
    """Calibrated probabilities, or the labels if nothing can be calibrated."""
    logits = np.empty_like(p)
    for rows in blocks(*p.shape):
        logits[rows] = _logit(p[rows].astype(np.float64))
    try:
        found = fit(logits, y, method="platt", per_class=True, shrink=shrink)
        return found.probabilities(logits)
    except ValueError:  # the scores do not rise with the labels
        return (y == 1).astype(np.float32)


def pack(p: NDArray, counted: NDArray) -> NDArray:
    """Probabilities of float32 and how much of a positive each is, [n], as one number
    of uint64: sorted, the highest probability comes first."""
    # Bits of floats that are not negative (-0 + 0 = 0) have their order.
    order = ~(p + np.float32(0)).view(np.uint32)
    return (order.astype(np.uint64) << 32) | counted.astype(np.float32).view(np.uint32)


def unpack(packed: NDArray) -> tuple[NDArray, NDArray]:
    high, low = (packed >> 32).astype(np.uint32), packed.astype(np.uint32)
    return (~high).view(np.float32), low.view(np.float32)


def _best(
    packed: NDArray,
    beta: float,
    precision: float | None,
    recall: float | None,
) -> float:
    """The threshold for the entries [n] of `pack`, which it sorts.

    0.5 where nothing can be chosen: all probabilities are 0.
    """
    packed.sort()
    parts = [packed[part] for part in blocks(len(packed), 1)]
    positives = sum(unpack(part)[1].sum(dtype=np.float64) for part in parts)
    best, threshold = (False, -np.inf), 0.5
    true_before = said_before = 0.0
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        p, counted = unpack(part)
        next_p = np.float32(0) if after is None else unpack(after[:1])[0][0]
        following = np.append(p[1:], next_p)
        last = np.flatnonzero(p > following)  # of each group of equal ones
        true = true_before + np.cumsum(counted, dtype=np.float64)
        true_before, true = true[-1], true[last]
        said = said_before + last + 1
        said_before += len(p)
        if not last.size:
            continue
        if precision is not None:
            quality = true / said
            enough = quality >= precision - 1e-12
            # The most recall; of those the first has the most precision.
            rank = np.where(enough, true, -1) if enough.any() else quality
        elif recall is not None:
            enough = true >= (recall - 1e-12) * positives
            rank = np.where(enough, true / said, -1.0) if enough.any() else true
        else:
            enough = np.zeros(1, bool)
            rank = true / (beta**2 * positives + said)
        i = int(np.argmax(rank))
        if (found := (bool(enough.any()), rank[i])) > best:
            best, above, below = found, p[last[i]], following[last[i]]
            middle = np.float32((float(above) + float(below)) / 2)
            threshold = float(middle if middle < above else below)
    return threshold


def _logit(p: NDArray) -> NDArray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))
