"""Probabilities that can be taken at their word: sigmoid(scale * logit + bias).

Numpy. Labels are 1, 0 or -1 (not annotated: left out of everything).
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mljax.metrics import checked

METHODS = ("temperature", "platt")

_MOST_STEPS = 50  # Newton's; it takes 5 to 10
_CLOSE = 1e-7  # a step that moves nothing by more than this is the last
_ROUNDING = 1e-12  # a loss that is larger by less, relatively, has not grown
# Entries that are looked at at once, by each thread: what is made of them, a few times
# 4 MB, is all the memory that is needed beside what is given.
_BLOCK = 500_000
_THREADS = min(os.cpu_count() or 1, 8)


class Calibration(NamedTuple):
    """What is done to a logit before the sigmoid.

    Attributes:
        scale: float32 [num_classes], above 0; 1 / temperature.
        bias: float32 [num_classes].
    """

    scale: np.ndarray
    bias: np.ndarray

    def probabilities(self, logits: ArrayLike) -> NDArray[np.float32]:
        """[..., num_classes], of logits of that shape."""
        logits = np.asarray(logits, np.float32)
        table = logits.reshape(-1, logits.shape[-1])
        found = np.empty_like(table)
        for rows in blocks(*table.shape):
            found[rows] = _sigmoid(self.scale * table[rows] + self.bias)
        return found.reshape(logits.shape)


def fit(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    method: str,
    per_class: bool = False,
    shrink: float = 10.0,
) -> Calibration:
    """The scale and bias with the smallest cross-entropy on held-out images.

    "temperature" (Guo et al. 2017, arXiv 1706.04599, section 4.2) fits the scale and
    leaves the bias 0, so that every ranking stays as it is; "platt" (Platt 1999,
    "Probabilistic outputs for support vector machines") fits both. Its targets are
    Platt's, (N+ + 1) / (N+ + 2) and 1 / (N- + 2), so that nothing runs away where
    positives and negatives can be told apart.

    Args:
      logits: [num_images, num_classes]; for cosines times their scale.
      labels: [num_images, num_classes]; 1, 0 or -1 (ignored).
      method: "temperature" or "platt".
      per_class: a scale and bias for each class, instead of one for all of them.
      shrink: with per_class, a class with P positives gets P / (P + shrink) of its own
        and the rest of what is best for all classes.

    Returns:
      A `Calibration`; classes that lack positives or negatives, or are ranked upside
      down, have that of all classes.

    Raises:
      ValueError: an unknown method, arrays that do not fit, or scores that do not
        rise with the labels at all.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if shrink < 0:
        raise ValueError(f"shrink must be at least 0, got {shrink}")
    z, y = checked("logits", logits, labels)
    num_classes, with_bias = z.shape[1], method == "platt"
    scale, bias = _of_all(z, y, with_bias)
    if not scale > 0:
        raise ValueError("the scores do not rise with the labels: nothing to calibrate")
    share: NDArray = np.zeros(num_classes)
    own = np.full(num_classes, scale), np.full(num_classes, bias)
    if per_class:
        positives = np.count_nonzero(y == 1, axis=0)
        negatives = np.count_nonzero(y == 0, axis=0)
        fitted = np.flatnonzero((positives > 0) & (negatives > 0))
        scales, biases = _of_each(z, y, fitted, with_bias)
        up = scales > 0
        own[0][fitted[up]], own[1][fitted[up]] = scales[up], biases[up]
        share = positives / np.maximum(positives + shrink, 1e-12)
    return Calibration(
        (share * own[0] + (1 - share) * scale).astype(np.float32),
        (share * own[1] + (1 - share) * bias).astype(np.float32),
    )


def calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = 15
) -> float:
    """Expected calibration error over all entries, in [0, 1].

    The entries (image, class) are sorted into equal bins of probability; the error is
    the mean, over entries, of |mean probability - share of positives| of their bin.
    Naeini et al. 2015; of one class, for [num_images, 1].

    Args:
      probabilities: [num_images, num_classes].
      labels: [num_images, num_classes]; 1, 0 or -1 (ignored).
      bins: how many.

    Raises:
      ValueError: arrays that do not fit, or bins below 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    p, y = checked("probabilities", probabilities, labels)
    return _error(((p[rows], y[rows]) for rows in blocks(*p.shape)), bins)


def class_calibration_error(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes of `calibration_error`, of those with annotated images."""
    p, y = checked("probabilities", probabilities, labels)
    each = []
    for columns in blocks(*p.shape[::-1]):
        pairs = zip(_columns(p, columns), _columns(y, columns), strict=True)
        each += [_error([pair], 15) for pair in pairs if (pair[1] != -1).any()]
    return float(np.mean(each)) if each else float("nan")


def _error(parts: Iterable[tuple[NDArray, NDArray]], bins: int) -> float:
    """`calibration_error` of (probabilities, labels) that come in parts."""
    surplus, count = np.zeros(bins), 0
    for p, y in parts:
        p, y = p[y != -1].astype(np.float64), y[y != -1]
        place = np.clip((p * bins).astype(int), 0, bins - 1)
        surplus += np.bincount(place, p - y, minlength=bins)
        count += len(p)
    return float(np.abs(surplus).sum() / max(count, 1))


def blocks(length: int, width: int) -> list[slice]:
    """Parts of the rows of a table, of about half a million values each."""
    step = max(1, _BLOCK // max(1, width))
    return [slice(start, start + step) for start in range(0, length, step)]


def _columns(table: NDArray, columns: Any) -> NDArray:
    """Those columns as rows, one after the other in memory."""
    return np.ascontiguousarray(table[:, columns].T)


def _of_all(z: NDArray, y: NDArray, with_bias: bool) -> tuple[float, float]:
    """(scale, bias) of all entries [num_images, num_classes] as one."""
    parts = blocks(*z.shape) or [slice(0)]

    def part(rows: slice) -> _Entries:
        return _Entries(z[rows].reshape(1, -1), y[rows].reshape(1, -1))

    with ThreadPoolExecutor(_THREADS) as threads:

        def over_all(of_part: Callable[[_Entries], NDArray]) -> NDArray:
            each = threads.map(lambda rows: of_part(part(rows)), parts)
            return sum(each, start=np.zeros(()))

        counts = over_all(_Entries.counts)
        a, b = _newton(
            counts, lambda a, b: over_all(lambda part: part.sums(a, b)), with_bias
        )
    return float(a[0]), float(b[0])


def _of_each(
    z: NDArray, y: NDArray, fitted: NDArray, with_bias: bool
) -> tuple[NDArray, NDArray]:
    """(scales, biases) of the columns `fitted`, each on its own."""

    def some(part: slice) -> NDArray:
        columns = fitted[part]
        entries = _Entries(_columns(z, columns), _columns(y, columns))
        return np.stack(_newton(entries.counts(), entries.sums, with_bias))

    with ThreadPoolExecutor(_THREADS) as threads:
        parts = list(threads.map(some, blocks(len(fitted), len(z))))
    scales, biases = np.concatenate(parts, axis=1) if parts else np.empty((2, 0))
    return scales, biases


class _Entries:
    """Logits and labels, [rows, n] each; every row is fitted on its own."""

    def __init__(self, z: NDArray, y: NDArray):
        self.known = y != -1
        self.positive = y == 1
        self.z = np.where(self.known, z, 0).astype(np.float64)

    def counts(self) -> NDArray:
        """[4, rows]: positives, negatives, and the sums of their logits."""
        kinds = self.positive, self.known & ~self.positive
        numbers = [np.count_nonzero(kind, axis=1) for kind in kinds]
        return np.stack([*numbers, *((self.z * kind).sum(1) for kind in kinds)])

    def sums(self, a: NDArray, b: NDArray) -> NDArray:
        """[6, rows], for p = sigmoid(x), x = a z + b and w = p (1 - p): the sums of
        log(1 + exp(x)), p z, p, w z z, w z and w."""
        x = a[:, None] * self.z + b[:, None]
        e = np.exp(-np.abs(x))
        p = np.where(x >= 0, 1, e) / (1 + e)
        p *= self.known
        wz = (w := p * (1 - p)) * self.z
        softplus = (np.maximum(x, 0) + np.log1p(e)) * self.known
        each = softplus, p * self.z, p, wz * self.z, wz, w
        return np.stack([values.sum(1) for values in each])


def _newton(
    counts: NDArray, sums: Callable[[NDArray, NDArray], NDArray], with_bias: bool
) -> tuple[NDArray, NDArray]:
    """(scale, bias), [rows] each, of the smallest cross-entropy of each row.

    counts, sums: those of `_Entries`.
    """
    positives, negatives, z_positives, z_negatives = counts
    high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
    sum_t = high * positives + low * negatives
    sum_tz = high * z_positives + low * z_negatives
    count = np.maximum(positives + negatives, 1)

    def look(a: NDArray, b: NDArray) -> tuple[NDArray, tuple[NDArray, ...]]:
        """The cross-entropies, and what a step is made of."""
        softplus, sum_pz, sum_p, *curves = sums(a, b)
        loss = (softplus - a * sum_tz - b * sum_t) / count
        return loss, (sum_pz - sum_tz, sum_p - sum_t, *curves)

    a, b = np.ones(len(count)), np.zeros(len(count))
    now, slopes = look(a, b)
    for _ in range(_MOST_STEPS):
        by_a, by_b, aa, ab, bb = slopes
        # A little more on the diagonal: a flat loss must not give a step to nowhere.
        aa, bb = aa + 1e-9 + 1e-9 * aa, bb + 1e-9 + 1e-9 * bb
        if with_bias:
            determinant = aa * bb - ab * ab
            da = (bb * by_a - ab * by_b) / determinant
            db = (aa * by_b - ab * by_a) / determinant
        else:
            da, db = by_a / aa, np.zeros_like(by_a)
        length = np.ones_like(a)
        for _ in range(40):  # half as far wherever the loss would grow
            new, slopes = look(a - length * da, b - length * db)
            worse = ~(new <= now + _ROUNDING * np.abs(now))
            if not worse.any():
                break
            length = np.where(worse, length / 2, length)
        else:
            length = np.where(worse, 0, length)
            new, slopes = look(a - length * da, b - length * db)
        a, b, now = a - length * da, b - length * db, new
        if np.abs(np.concatenate([length * da, length * db])).max(initial=0) < _CLOSE:
            break
    return a, b


def _sigmoid(x: NDArray) -> NDArray:
    """Without overflow, in the type of x."""
    return np.exp(-np.logaddexp(0, -x)).astype(x.dtype)
