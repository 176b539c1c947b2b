"""What the report shows beyond `mljax.metrics`: curves, thresholds, confusions.

Labels are 1, 0 or -1 (not annotated: left out of everything).
"""

from typing import NamedTuple

import numpy as np

from mljax.calibration import blocks, calibration_error
from mljax.operating_points import pack, unpack

BINS = 15  # of probability, for calibration
GRID = np.linspace(0, 1, 101)  # recalls at which labels' curves are compared


class Curve(NamedTuple):
    """Precision and recall at every threshold, from the highest: [num_thresholds]."""

    recall: np.ndarray
    precision: np.ndarray
    threshold: np.ndarray

    def at(self, recalls: np.ndarray) -> np.ndarray:
        """The highest precision at each of these recalls or above."""
        best = np.maximum.accumulate(self.precision[::-1])[::-1]
        place = np.searchsorted(self.recall, recalls - 1e-12)
        return best[np.minimum(place, len(best) - 1)]


def curve(scores: np.ndarray, labels: np.ndarray) -> Curve | None:
    """Of one label, or of all pooled: arrays of one shape. None without a positive."""
    known = labels != -1
    scores, positive = scores[known], labels[known] == 1
    if not positive.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # of equal scores
    right, retrieved = np.cumsum(positive)[last], last + 1
    return Curve(right / right[-1], right / retrieved, scores[last])


def pooled_curve(p: np.ndarray, labels: np.ndarray, points: int) -> Curve | None:
    """Of all labels pooled: so many points at most of `curve`, evenly among them.

    Args:
        p: probabilities, float32 [num_images, num_classes].
        labels: [num_images, num_classes].
        points: how many.
    """
    entries, length = np.empty(np.count_nonzero(labels != -1), np.uint64), 0
    for rows in blocks(*p.shape):
        known = labels[rows] != -1
        some = pack(p[rows][known], labels[rows][known] == 1)
        entries[length : length + len(some)] = some
        length += len(some)
    entries.sort()
    positive, ends = np.zeros(length, bool), []
    for part in blocks(length, 1):
        positive[part] = unpack(entries[part])[1] > 0
        high = entries[part.start : part.stop + 1] >> 32  # with the next part's first
        ends.append(part.start + np.flatnonzero(np.diff(high)))
    if not positive.any():
        return None
    last = np.append(np.concatenate(ends), length - 1)  # of equal scores
    if len(last) > points:
        last = last[np.linspace(0, len(last) - 1, points).astype(int)]
    begin = np.append(0, last[:-1] + 1)
    right = np.cumsum(np.add.reduceat(positive, begin, dtype=np.int64))
    return Curve(right / right[-1], right / (last + 1), unpack(entries[last])[0])


class Quality(NamedTuple):
    """What thresholds give, for each class: [num_classes]."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def at_thresholds(
    p: np.ndarray, labels: np.ndarray, thresholds: float | np.ndarray
) -> Quality:
    """What one threshold or one for each class gives; 0/0 = 0.

    Args:
        p: probabilities [num_images, num_classes].
        labels: [num_images, num_classes].
        thresholds: a number or [num_classes].
    """
    predicted, positive = (p > thresholds) & (labels != -1), labels == 1
    right = (predicted & positive).sum(0)
    precision = right / np.maximum(predicted.sum(0), 1)
    recall = right / np.maximum(positive.sum(0), 1)
    f1 = 2 * right / np.maximum(predicted.sum(0) + positive.sum(0), 1)
    return Quality(precision, recall, f1)


class Calibration(NamedTuple):
    """Entries (image, class) sorted into equal bins of probability.

    Attributes:
        said, true: mean probability and share of positives in each bin that has any.
        entries: how many are in it.
        error: the mean over all entries of |said - true| of their bin (ECE).
    """

    said: np.ndarray
    true: np.ndarray
    entries: np.ndarray
    error: float


def calibration(p: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Calibration:
    """Reliability of probabilities [num_images, num_classes] (Naeini et al. 2015).

    NaN counts as 0, as in all of evaluation.
    """
    p = np.nan_to_num(p)
    error = calibration_error(p, labels, bins)
    count, said, true = np.zeros(bins, int), np.zeros(bins), np.zeros(bins)
    for rows in blocks(*p.shape):
        known = labels[rows] != -1
        some, y = p[rows][known].astype(np.float64), labels[rows][known] == 1
        place = np.clip((some * bins).astype(int), 0, bins - 1)
        count += np.bincount(place, minlength=bins)
        said += np.bincount(place, some, bins)
        true += np.bincount(place, y, bins)
    used = count > 0
    count = count[used]
    return Calibration(said[used] / count, true[used] / count, count, error)


def confusions(
    p: np.ndarray, labels: np.ndarray, threshold: float | np.ndarray = 0.5
) -> np.ndarray:
    """In how many images label i is missed and label j is wrongly said.

    Args:
        p: probabilities [num_images, num_classes].
        labels: [num_images, num_classes].
        threshold: one number, or [num_classes].

    Returns:
        Integers [num_classes, num_classes], row i the missed one.
    """
    missed = (labels == 1) & (p <= threshold)
    wrong = (labels == 0) & (p > threshold)
    # float32 products are exact up to 2^24 images, and fast.
    return (missed.astype(np.float32).T @ wrong.astype(np.float32)).astype(int)


def entry_losses(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log of the probability of what is true, 0 where unknown: the shape of p."""
    p = np.clip(p.astype(np.float64), 1e-6, 1 - 1e-6)
    losses = -np.where(labels == 1, np.log(p), np.log1p(-p))
    return np.where(labels == -1, 0.0, losses)


def most_wrong(
    p: np.ndarray,
    labels: np.ndarray,
    count: int,
    threshold: float | np.ndarray = 0.5,
) -> np.ndarray:
    """Rows of the images with the highest log loss over their labels, highest first.

    Only images in which something known is wrong at the threshold: one number, or
    [num_classes].
    """
    loss = np.full(len(p), -1.0)
    for rows in blocks(*p.shape):
        some, y = p[rows], labels[rows]
        wrong = (((some > threshold) != (y == 1)) & (y != -1)).any(1)
        loss[rows] = np.where(wrong, entry_losses(some, y).sum(1), -1.0)
    order = np.argsort(-loss, kind="stable")[:count]
    return order[loss[order] >= 0]
