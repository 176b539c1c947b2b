"""Multi-label losses: one independent sigmoid per class.

Labels are 1 (present), 0 (absent), -1 (not annotated: adds no loss and no gradient,
whatever its output is) or a soft target in [0, 1]. A loss is computed in at least
float32, in terms of log-sigmoids, so that values and gradients stay finite where
`log(sigmoid(x))` or a power of a vanished probability would not.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import log_sigmoid
from jax.typing import ArrayLike

from mljax.errors import UserError

REDUCTIONS = ("sum", "mean")

# Stands for log(0). Finite, so that 0 * log(0) is 0 and not NaN.
_LOG_ZERO = -1e30


def bce(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "sum",
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Binary cross-entropy, exact for finite logits of any size.

    L = -sum t log p + (1 - t) log(1 - p) with p = sigmoid(x).

    Args:
      logits: x, [batch, num_classes].
      labels: t, [batch, num_classes]; 1, 0, -1 (ignored) or soft in [0, 1].
      label_smoothing: e; t becomes t (1 - e), then every t = 0 becomes e.
      reduction: "sum" over the batch, or "mean" = sum / batch.
      class_weights: [num_classes], a factor for each class's loss; None = all 1.

    Returns:
      A scalar, float32 or float64.

    Raises:
      ValueError: an option out of its range, or shapes that differ.
    """
    return asl(
        logits,
        labels,
        gamma_neg=0.0,
        gamma_pos=0.0,
        probability_margin=0.0,
        label_smoothing=label_smoothing,
        eps=0.0,
        reduction=reduction,
        class_weights=class_weights,
    )


def focal(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float = 2.0,
    label_smoothing: float = 0.0,
    reduction: str = "sum",
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Focal loss, symmetric in positives and negatives.

    L = -sum t (1 - p)^gamma log p + (1 - t) p^gamma log(1 - p) with p = sigmoid(x),
    for labels 0 and 1; soft targets as in `asl`.

    Args:
      logits: x, [batch, num_classes].
      labels: t, [batch, num_classes]; 1, 0, -1 (ignored) or soft in [0, 1].
      gamma: how much well-classified entries are down-weighted; 0 is `bce`.
      label_smoothing, reduction, class_weights: as in `bce`, and so is what is
        returned and raised.

    References:
      Lin et al., Focal Loss for Dense Object Detection, arXiv 1708.02002, eq. 4.
    """
    _require(0 <= gamma < math.inf, "gamma", gamma, "at least 0 and finite")
    return asl(
        logits,
        labels,
        gamma_neg=gamma,
        gamma_pos=gamma,
        probability_margin=0.0,
        label_smoothing=label_smoothing,
        eps=0.0,
        reduction=reduction,
        class_weights=class_weights,
    )


def asl(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    probability_margin: float = 0.05,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    eps: float = 1e-8,
    weight_gradient: bool = True,
    reduction: str = "sum",
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Asymmetric loss: negatives are focused harder, and easy ones dropped.

    L = -sum w (t log p + (1 - t) log n), p = sigmoid(scale x),
    n = min(1 - p + probability_margin, 1),
    w = (1 - p t - n (1 - t)) ^ (gamma_pos t + gamma_neg (1 - t)).

    Args:
      logits: x, [batch, num_classes].
      labels: t, [batch, num_classes]; 1, 0, -1 (ignored) or soft in [0, 1].
      gamma_neg: focusing exponent of the negatives.
      gamma_pos: focusing exponent of the positives.
      probability_margin: negatives with p below it add nothing.
      scale: factor on the logits.
      eps: p and n are not taken below it inside the logs, and have no gradient there
        (about |x| > 18 for 1e-8): the published form. 0 = no such floor.
      weight_gradient: gradients flow through w. Its authors train without.
      label_smoothing, reduction, class_weights: as in `bce`, and so is what is
        returned and raised.

    References:
      Ridnik et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021,
      arXiv 2009.14119.
    """
    _check_common(gamma_neg, gamma_pos, probability_margin, label_smoothing, reduction)
    _require(0 < scale < math.inf, "scale", scale, "above 0 and finite")
    _require(0 <= eps < 1, "eps", eps, "at least 0 and below 1")
    x, targets, ignored = _prepare(logits, labels, label_smoothing)
    x = scale * x

    log_p = log_sigmoid(x)
    log_n = _log_shifted_sigmoid(-x, probability_margin)
    if eps > 0:
        log_eps = math.log(eps)
        # Compared so that NaN stays NaN.
        log_p = jnp.where(log_p < log_eps, log_eps, log_p)
        log_n = jnp.where(log_n < log_eps, log_eps, log_n)
    loss = -(targets * log_p + (1 - targets) * log_n)

    if gamma_neg > 0 or gamma_pos > 0:
        if probability_margin == 0:
            log_one_minus_n = log_sigmoid(x)
        else:
            log_one_minus_n = _log(jax.nn.sigmoid(x) - probability_margin)
        weight = _focus(log_sigmoid(-x), log_one_minus_n, targets, gamma_pos, gamma_neg)
        loss = (weight if weight_gradient else lax.stop_gradient(weight)) * loss
    return _reduce(loss, ignored, reduction, class_weights)


def aam(
    cosines: ArrayLike,
    labels: ArrayLike,
    *,
    scale: float = 23.0,
    margin: float = 0.0,
    k: float = 0.7,
    gamma_neg: float = 0.0,
    gamma_pos: float = 0.0,
    probability_margin: float = 0.05,
    label_smoothing: float = 0.0,
    reduction: str = "sum",
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Angular margin loss with asymmetric focusing, on cosines.

    L = -sum w (k/s t log p + (1 - k)/s (1 - t) log n),
    p = sigmoid(s (c - m)), n = sigmoid(-s (c + m)).
    With both gammas 0, w = 1. Otherwise n is replaced by
    min(n + probability_margin, 1), and
    w = (n t + p (1 - t)) ^ (gamma_pos t + gamma_neg (1 - t)) with gradients flowing
    through it. Unlike in `asl` the negatives' weight uses the unshifted p.

    Args:
      cosines: c, [batch, num_classes], in [-1, 1] or nearly; not clipped here.
      labels: t, [batch, num_classes]; 1, 0, -1 (ignored) or soft in [0, 1].
      scale: s, the logit per unit of cosine.
      margin: m, in units of cosine.
      k: weight of the positives, 1 - k of the negatives.
      gamma_neg: focusing exponent of the negatives.
      gamma_pos: focusing exponent of the positives.
      probability_margin: shift of n; acts only with a gamma above 0.
      label_smoothing, reduction, class_weights: as in `bce`, and so is what is
        returned and raised.

    References:
      Prokofiev & Sovrasov, Combining Metric Learning and Attention Heads For Accurate
      and Efficient Multilabel Image Classification, arXiv 2209.06585.
    """
    _check_common(gamma_neg, gamma_pos, probability_margin, label_smoothing, reduction)
    _require(0 < scale < math.inf, "scale", scale, "above 0 and finite")
    _require(0 <= margin < math.inf, "margin", margin, "at least 0 and finite")
    _require(0 <= k <= 1, "k", k, "between 0 and 1")
    c, targets, ignored = _prepare(cosines, labels, label_smoothing)

    focusing = gamma_neg > 0 or gamma_pos > 0
    log_p = log_sigmoid(scale * (c - margin))
    log_n = _log_shifted_sigmoid(
        -scale * (c + margin), probability_margin if focusing else 0.0
    )
    loss = -(k * targets * log_p + (1 - k) * (1 - targets) * log_n) / scale
    if focusing:
        loss = _focus(log_n, log_p, targets, gamma_pos, gamma_neg) * loss
    return _reduce(loss, ignored, reduction, class_weights)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "bce": bce,
    "focal": focal,
    "asl": asl,
    "aam": aam,
}


def is_angular(name: str) -> bool:
    """Whether a loss works on cosines in [-1, 1] and not on logits.

    Raises:
      ValueError: there is no such loss.
    """
    _require(name in LOSSES, "loss.name", name, f"one of {', '.join(LOSSES)}")
    return name == "aam"


def make_loss(
    loss_config: Mapping[str, Any], class_weights: ArrayLike | None = None
) -> Callable[[ArrayLike, ArrayLike], jax.Array]:
    """The loss that a config describes, with its options filled in.

    Args:
      loss_config: `config.loss`: name, reduction, label_smoothing, and under the
        loss's own name its other options.
      class_weights: [num_classes], or None.

    Returns:
      loss(outputs [batch, num_classes], labels [batch, num_classes]) -> scalar.

    Raises:
      UserError: there is no such loss, or one of its options is out of range.
    """
    name = loss_config["name"]
    try:
        is_angular(name)
        loss = partial(
            LOSSES[name],
            reduction=loss_config["reduction"],
            label_smoothing=loss_config["label_smoothing"],
            class_weights=class_weights,
            **(loss_config[name] if name in loss_config else {}),
        )
        # A trace, without computing anything: shows a bad option now rather than
        # after the data and the model have been built.
        num_classes = 1 if class_weights is None else jnp.size(class_weights)
        example = jax.ShapeDtypeStruct((1, num_classes), jnp.float32)
        jax.eval_shape(loss, example, example)
    except ValueError as error:
        raise UserError(f"config.loss ({name}): {error}") from None
    return loss


def logits(outputs: ArrayLike, loss_config: Mapping[str, Any]) -> jax.Array:
    """What the sigmoid is taken of, for a model trained with this loss.

    Args:
      outputs: [..., num_classes], cosines for `aam`, logits otherwise.
      loss_config: `config.loss`.

    Returns:
      scale * outputs for `aam`, outputs otherwise; the shape of outputs, float32 or
      float64.

    Raises:
      ValueError: there is no such loss.
    """
    name = loss_config["name"]
    outputs = _at_least_float32(outputs)
    return loss_config[name]["scale"] * outputs if is_angular(name) else outputs


def probabilities(outputs: ArrayLike, loss_config: Mapping[str, Any]) -> jax.Array:
    """sigmoid of `logits`: what a model trained with this loss says."""
    return jax.nn.sigmoid(logits(outputs, loss_config))


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check_common(
    gamma_neg: float,
    gamma_pos: float,
    probability_margin: float,
    label_smoothing: float,
    reduction: str,
) -> None:
    finite, share = "at least 0 and finite", "at least 0 and below 1"
    _require(0 <= gamma_neg < math.inf, "gamma_neg", gamma_neg, finite)
    _require(0 <= gamma_pos < math.inf, "gamma_pos", gamma_pos, finite)
    _require(
        0 <= probability_margin < 1, "probability_margin", probability_margin, share
    )
    _require(0 <= label_smoothing < 1, "label_smoothing", label_smoothing, share)
    choices = f"one of {', '.join(REDUCTIONS)}"
    _require(reduction in REDUCTIONS, "reduction", reduction, choices)


def _at_least_float32(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _prepare(
    outputs: ArrayLike, labels: ArrayLike, label_smoothing: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs and targets in the dtype of the loss, and which entries are ignored."""
    outputs = _at_least_float32(outputs)
    labels = jnp.asarray(labels)
    if outputs.shape != labels.shape:
        raise ValueError(
            f"outputs and labels must have one shape [batch, num_classes], "
            f"got {outputs.shape} and {labels.shape}"
        )
    ignored = labels < 0
    targets = labels.astype(outputs.dtype)
    if label_smoothing > 0:
        targets = targets * (1 - label_smoothing)
        targets = jnp.where(targets == 0, label_smoothing, targets)
    # Replaced on the way in as well as in `_reduce`: a NaN that is only masked on the
    # way out comes back in the gradient as 0 * NaN.
    return jnp.where(ignored, 0, outputs), jnp.where(ignored, 0, targets), ignored


def _log(x: jax.Array) -> jax.Array:
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), _LOG_ZERO)


def _log_shifted_sigmoid(z: jax.Array, shift: float) -> jax.Array:
    """log(min(sigmoid(z) + shift, 1))."""
    if shift == 0:
        return log_sigmoid(z)
    shifted = jax.nn.sigmoid(z) + shift
    return jnp.log(jnp.where(shifted >= 1, 1, shifted))  # NaN stays NaN


def _focus(
    log_pos: jax.Array,
    log_neg: jax.Array,
    targets: jax.Array,
    gamma_pos: float,
    gamma_neg: float,
) -> jax.Array:
    """(pos t + neg (1 - t)) ^ (gamma_pos t + gamma_neg (1 - t)), from logs.

    Not a power: its gradient at a base of 0 is NaN for an exponent below 1.
    """
    log_base = jnp.logaddexp(log_pos + _log(targets), log_neg + _log(1 - targets))
    return jnp.exp((gamma_pos * targets + gamma_neg * (1 - targets)) * log_base)


def _reduce(
    loss: jax.Array,
    ignored: jax.Array,
    reduction: str,
    class_weights: ArrayLike | None,
) -> jax.Array:
    loss = jnp.where(ignored, 0, loss)
    if class_weights is not None:
        class_weights = jnp.asarray(class_weights, loss.dtype)
        if class_weights.shape != loss.shape[-1:]:
            raise ValueError(
                f"class_weights must be one number for each of the {loss.shape[-1]} "
                f"classes, got shape {class_weights.shape}"
            )
        loss = loss * class_weights
    total = jnp.sum(loss)
    return total / loss.shape[0] if reduction == "mean" else total
