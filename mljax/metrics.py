"""Exact multi-label metrics, in numpy.

Labels are 1, 0 or -1 (not annotated: left out of everything). No result depends on
the order of the images.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Entries that are copied and sorted at a time: bounds the memory, a few times 16 MiB.
# Each thread has some of its own.
_BLOCK = 4_000_000
_MOST_THREADS = 8


def average_precision(
    scores: ArrayLike, labels: ArrayLike, *, envelope: bool = False
) -> NDArray[np.float64]:
    """Average precision of every class, non-interpolated.

    AP = sum over thresholds of (recall - previous recall) * precision, which is the
    mean, over the positives, of the precision among the images that score at least as
    high. Equal scores are one threshold, as in scikit-learn.

    Args:
      scores: [num_images, num_classes], higher = more likely; any monotone scale.
        Give the model's outputs rather than probabilities, which saturate to ties.
      labels: [num_images, num_classes]; 1, 0 or -1 (ignored).
      envelope: replace the precision at each recall by the highest precision at that
        recall or above (PASCAL VOC 2010 and later). Never below the plain AP.

    Returns:
      [num_classes] float64 in [0, 1]; NaN where a class has no positive.

    Raises:
      ValueError: a NaN score whose label counts, another label, or shapes that differ.
    """
    scores, labels = _check_shapes("scores", scores, labels)
    num_images, num_classes = scores.shape
    dtype = np.result_type(scores.dtype, np.float32)
    result = np.full(num_classes, np.nan)
    workers = min(os.cpu_count() or 1, _MOST_THREADS)
    # Each thread has a share of a small table, too.
    step = max(1, min(_BLOCK // max(1, num_images), math.ceil(num_classes / workers)))

    def measure(start: int) -> None:
        block = slice(start, start + step)
        # A class at a time is a stride of a whole row: transpose some classes at once.
        block_scores = np.ascontiguousarray(scores[:, block].T, dtype=dtype)
        block_labels = np.ascontiguousarray(labels[:, block].T)
        _check_values("scores", block_scores, block_labels)
        for i, (s, y) in enumerate(zip(block_scores, block_labels, strict=True)):
            result[start + i] = _class_average_precision(s, y, envelope)

    starts = range(0, num_classes, step)
    # Sorting is nearly all of it, and numpy sorts without holding the other threads.
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(measure, starts))
    return result


def mean_average_precision(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    envelope: bool = False,
    empty_as_zero: bool = False,
) -> float:
    """Mean over the classes of `average_precision`, in [0, 1].

    Args:
      scores: [num_images, num_classes].
      labels: [num_images, num_classes]; 1, 0 or -1 (ignored).
      envelope: as in `average_precision`.
      empty_as_zero: count a class without a positive as 0 instead of leaving it out.

    Returns:
      The mean; NaN if no class is left to average.

    Raises:
      ValueError: a NaN score whose label counts, another label, or shapes that differ.
    """
    per_class = average_precision(scores, labels, envelope=envelope)
    empty = np.isnan(per_class)
    per_class = np.where(empty, 0, per_class) if empty_as_zero else per_class[~empty]
    return float(per_class.mean()) if per_class.size else float("nan")


def classification_report(
    probabilities: ArrayLike,
    labels: ArrayLike,
    threshold: float | ArrayLike = 0.5,
    top_k: int | None = None,
    top_k_and_threshold: bool = False,
) -> dict[str, float]:
    """Precision, recall and F1 of the predicted labels, per class and overall.

    CP and CR are the means over all classes of precision and recall (0/0 = 0),
    CF1 = 2 CP CR / (CP + CR); OP, OR and OF1 pool the entries of all classes.

    Args:
      probabilities: [num_images, num_classes]; with top_k alone any scores.
      labels: [num_images, num_classes]; 1, 0 or -1 (neither predicted nor counted, and
        takes no place among the top k).
      threshold: predicted is probability > threshold; a number (rounded as the
        probabilities are) or [num_classes].
      top_k: predict the k most probable labels of an image instead, whatever the
        threshold. Of equal ones the label with the lower index goes first.
      top_k_and_threshold: with top_k, they must exceed the threshold too.

    Returns:
      {"CP", "CR", "CF1", "OP", "OR", "OF1"}, each in [0, 1].

    Raises:
      ValueError: a NaN probability whose label counts, another label, shapes that
        differ, a threshold of another shape, or top_k below 1 or no whole number.
    """
    probabilities, labels = _check_shapes("probabilities", probabilities, labels)
    num_images, num_classes = probabilities.shape
    threshold = np.asarray(threshold)
    # The kind of bfloat16 is V.
    floats = threshold.dtype.kind == "f" and probabilities.dtype.kind in "fV"
    if threshold.ndim == 0 and floats:
        # float32(0.3) is above 0.3, but a probability of 0.3 is not.
        threshold = threshold.astype(probabilities.dtype)
    if threshold.shape not in ((), (num_classes,)) or np.isnan(threshold).any():
        raise ValueError(
            f"threshold must be a number or one for each of {num_classes} classes, "
            f"got {threshold}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    if top_k is not None and top_k % 1:
        raise ValueError(f"top_k must be a whole number or None, got {top_k}")

    correct, predicted, positive = np.zeros((3, num_classes), np.int64)
    step = max(1, _BLOCK // max(1, num_classes))
    for start in range(0, num_images, step):
        p, y = probabilities[start : start + step], labels[start : start + step]
        _check_values("probabilities", p, y)
        chosen = y != -1
        if top_k is not None:
            chosen &= _top_k(np.where(chosen, p, -np.inf), int(top_k), chosen)
        if top_k is None or top_k_and_threshold:
            chosen &= p > threshold
        correct += np.count_nonzero(chosen & (y == 1), axis=0)
        predicted += np.count_nonzero(chosen, axis=0)
        positive += np.count_nonzero(y == 1, axis=0)

    cp = float(np.mean(_ratio(correct, predicted))) if num_classes else 0.0
    cr = float(np.mean(_ratio(correct, positive))) if num_classes else 0.0
    op = float(_ratio(correct.sum(), predicted.sum()))
    or_ = float(_ratio(correct.sum(), positive.sum()))
    return {
        "CP": cp,
        "CR": cr,
        "CF1": _harmonic_mean(cp, cr),
        "OP": op,
        "OR": or_,
        "OF1": _harmonic_mean(op, or_),
    }


def _class_average_precision(scores: NDArray, labels: NDArray, envelope: bool) -> float:
    positives = np.sort(scores[labels == 1])
    if not positives.size:
        return float("nan")
    # What scores below every positive is retrieved with none, and need not be sorted:
    # after training that is most of it.
    others = np.sort(scores[(labels != -1) & (scores >= positives[0])])
    # How many score at least as high as each positive, counting equals.
    true = positives.size - np.searchsorted(positives, positives)
    retrieved = others.size - np.searchsorted(others, positives)
    precision = true / retrieved
    if envelope:
        # Scores ascend here, so recall descends: all before an entry has a higher one.
        precision = np.maximum.accumulate(precision)
    return float(precision.mean())


def _top_k(p: NDArray, k: int, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Marks the k largest of each row; of equal ones the first that is allowed.

    What is not allowed must be -inf, but others may be so as well.
    """
    if k >= p.shape[1]:
        return np.ones(p.shape, bool)
    kth = np.partition(p, -k, axis=1)[:, -k, None]
    above, tied = p > kth, (p == kth) & allowed
    places = k - np.count_nonzero(above, axis=1, keepdims=True)
    return above | (tied & (np.cumsum(tied, axis=1) <= places))


def _ratio(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    """part / whole, 0 where whole (and with it part) is 0."""
    return part / np.maximum(whole, 1)


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def checked(name: str, values: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    """Both as arrays.

    Raises ValueError, naming `name`, unless they have one shape [num_images,
    num_classes], the values are numbers and the labels 1, 0 or -1.
    """
    values, labels = _check_shapes(name, values, labels)
    _check_values(name, values, labels)
    return values, labels


def _check_shapes(
    name: str, values: ArrayLike, labels: ArrayLike
) -> tuple[NDArray, NDArray]:
    values, labels = np.asarray(values), np.asarray(labels)
    if values.ndim != 2 or values.shape != labels.shape:
        raise ValueError(
            f"{name} and labels must have one shape [num_images, num_classes], "
            f"got {values.shape} and {labels.shape}"
        )
    return values, labels


def _check_values(name: str, values: NDArray, labels: NDArray) -> None:
    bad = np.isnan(values) & (labels != -1)
    if bad.any():
        raise ValueError(f"{name} must be numbers, got {np.count_nonzero(bad)} NaN")
    bad = (labels != 1) & (labels != 0) & (labels != -1)
    if bad.any():
        raise ValueError(f"labels must be 1, 0 or -1, got {labels[bad][0]}")
