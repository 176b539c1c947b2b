"""Probabilities that can be taken at their word: sigmoid(scale * logit + bias).

Numpy. Labels are 1, 0 or -1 (not annotated: left out of everything).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mljax.metrics import checked

METHODS = ("temperature", "platt")

_MOST_STEPS = 50  # Newton's; it takes 5 to 10
_CLOSE = 1e-7  # a step that moves nothing by more than this is the last


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
        return _sigmoid(self.scale * logits + self.bias)


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
    z = z.astype(np.float64)
    num_classes, with_bias = z.shape[1], method == "platt"
    scale, bias = _newton(z.reshape(-1, 1), y.reshape(-1, 1), with_bias)
    if not scale[0] > 0:
        raise ValueError("the scores do not rise with the labels: nothing to calibrate")
    share: NDArray = np.zeros(num_classes)
    own = np.repeat(scale, num_classes), np.repeat(bias, num_classes)
    if per_class:
        positives, negatives = (y == 1).sum(0), (y == 0).sum(0)
        fitted = np.flatnonzero((positives > 0) & (negatives > 0))
        scales, biases = _newton(z[:, fitted], y[:, fitted], with_bias)
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
    p, y = p[y != -1].astype(np.float64), y[y != -1]
    place = np.clip((p * bins).astype(int), 0, bins - 1)
    surplus = np.bincount(place, p - y, minlength=bins)
    return float(np.abs(surplus).sum() / max(len(p), 1))


def class_calibration_error(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes of `calibration_error`, of those with annotated images."""
    p, y = checked("probabilities", probabilities, labels)
    each = [
        calibration_error(p[:, [c]], y[:, [c]])
        for c in range(p.shape[1])
        if (y[:, c] != -1).any()
    ]
    return float(np.mean(each)) if each else float("nan")


def _newton(z: NDArray, y: NDArray, with_bias: bool) -> tuple[NDArray, NDArray]:
    """(scale, bias), [classes] each, of the smallest cross-entropy of each column."""
    known = y != -1
    positives, negatives = (y == 1).sum(0), (y == 0).sum(0)
    targets = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    count = np.maximum(known.sum(0), 1)

    def loss(a: NDArray, b: NDArray) -> NDArray:
        logit = a * z + b
        each = np.logaddexp(0, logit) - targets * logit
        return np.where(known, each, 0).sum(0) / count

    a, b = np.ones(z.shape[1]), np.zeros(z.shape[1])
    now = loss(a, b)
    for _ in range(_MOST_STEPS):
        p = _sigmoid(a * z + b)
        off = np.where(known, p - targets, 0)
        curve = np.where(known, p * (1 - p), 0)
        by_a, by_b = (off * z).sum(0), off.sum(0)
        aa, ab, bb = (curve * z * z).sum(0), (curve * z).sum(0), curve.sum(0)
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
            new = loss(a - length * da, b - length * db)
            worse = ~(new <= now)
            if not worse.any():
                break
            length = np.where(worse, length / 2, length)
        length = np.where(worse, 0, length)
        a, b = a - length * da, b - length * db
        now = loss(a, b)
        if np.abs(np.concatenate([length * da, length * db])).max(initial=0) < _CLOSE:
            break
    return a, b


def _sigmoid(x: NDArray) -> NDArray:
    """Without overflow, in the type of x."""
    return np.exp(-np.logaddexp(0, -x)).astype(x.dtype)
