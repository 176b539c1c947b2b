"""Schedules, parameter groups and optimisers: SGD, AdamW and LAMB from optax."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mljax.errors import UserError
from mljax.finetune import frozen_parameters, keep, lr_factors, path_name

# step -> value. A step that is a JAX array (a traced one too) gives a JAX value; an
# int or a numpy array gives a float64 one without touching a device.
Schedule = Callable[[Any], Any]
PyTree = Any

OPTIMIZERS = ("sgd", "adamw", "lamb")
SCHEDULES = ("one_cycle", "cosine", "constant")


class Optimizer(NamedTuple):
    """Like an optax transformation, but told the global step.

    init: params -> opt_state.
    update: (grads, opt_state, params, step) -> (updates, opt_state); the updates are
        added to the parameters (`optax.apply_updates`).
    learning_rate: step -> learning rate of the head's weights; that of biases and of
        the backbone can have a factor.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, PyTree, Any], tuple[PyTree, PyTree]]
    learning_rate: Schedule


def one_cycle(
    peak: float,
    total_steps: int,
    pct_start: float = 0.2,
    div_factor: float = 100.0,
    final_div_factor: float = 1000.0,
) -> Schedule:
    """One-cycle learning rate, with the steps of PyTorch's OneCycleLR.

    A cosine from peak / div_factor up to `peak` at step pct_start * total_steps - 1,
    then one down to peak / div_factor / final_div_factor at step total_steps - 1,
    where it stays.

    Args:
        peak: highest learning rate.
        total_steps: length of the run, at least 1.
        pct_start: share of the steps spent rising, in [0, 1].
        div_factor: peak over the first learning rate.
        final_div_factor: the first learning rate over the last.

    Returns:
        step -> learning rate, for scalars or arrays of steps; can be traced.

    Raises:
        ValueError: if total_steps, pct_start or a factor is out of range.

    References:
        Smith and Topin, "Super-Convergence" (2018), arXiv 1708.07120.
    """
    if not (div_factor > 0 and final_div_factor > 0):  # NaN is not
        factors = f"div_factor = {div_factor}, final_div_factor = {final_div_factor}"
        raise ValueError(f"{factors}: must be above 0")
    first = peak / div_factor
    return _two_cosines(total_steps, pct_start, first, peak, first / final_div_factor)


def one_cycle_momentum(
    total_steps: int,
    pct_start: float = 0.2,
    base: float = 0.85,
    maximum: float = 0.95,
) -> Schedule:
    """Momentum (Adam: b1) that mirrors `one_cycle`: maximum -> base -> maximum.

    Raises:
        ValueError: if total_steps, pct_start or a momentum is out of range.
    """
    if not (0 <= base < 1 and 0 <= maximum < 1):
        raise ValueError(
            f"base = {base}, maximum = {maximum}: must be at least 0 and below 1"
        )
    return _two_cosines(total_steps, pct_start, maximum, base, maximum)


def cosine(peak: float, total_steps: int, pct_start: float = 0.0) -> Schedule:
    """Linear warm-up over pct_start * total_steps steps, then a half cosine to 0.

    Raises:
        ValueError: if total_steps or pct_start is out of range.

    References:
        Loshchilov and Hutter, "SGDR" (2017), equation 5 without restarts,
        arXiv 1608.03983.
    """
    _check(total_steps, pct_start)
    warmup = pct_start * total_steps

    def schedule(step: Any) -> Any:
        xp = _numpy_of(step)
        step = xp.clip(step, 0, total_steps - 1)
        rise = xp.clip((step + 1) / max(warmup, 1.0), 0, 1)
        left = xp.clip((total_steps - step) / max(total_steps - warmup, 1.0), 0, 1)
        return peak * rise * _half_cosine(xp, left)

    return schedule


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: value


_NOT_DECAYED = ("norm", "query_embed", "pos_embed", "cls_token")


def parameter_groups(
    params: PyTree, decay_bias_and_norm: bool = False
) -> tuple[PyTree, PyTree]:
    """Which parameters are biases and which are decayed, by path and shape.

    A parameter whose path ends in "bias" is a bias. Decayed is what has two or more
    dimensions and is neither a bias, nor in a norm layer, nor an embedding: of queries,
    of positions or ViT's class token.

    Args:
        params: nested dict of arrays or shape structs.
        decay_bias_and_norm: decay everything.

    Returns:
        (is_bias, is_decayed): trees like `params` with a bool for each array.
    """

    def is_bias(path: Any, _: Any) -> bool:
        return path_name(path).endswith("bias")

    def is_decayed(path: Any, x: Any) -> bool:
        name = path_name(path)
        exempt = name.endswith("bias") or any(part in name for part in _NOT_DECAYED)
        return decay_bias_and_norm or (x.ndim > 1 and not exempt)

    return (
        jax.tree.map_with_path(is_bias, params),
        jax.tree.map_with_path(is_decayed, params),
    )


def make_optimizer(
    config: ConfigDict,
    batch_size: int,
    total_steps: int,
    params: PyTree,
    thaw_step: int = 0,
) -> Optimizer:
    """The optimiser of `config` (the `optim` part of configs/common.py).

    Its schedules follow the step passed to `update`, not a count of updates, so a
    skipped step does not delay them. Gradient clipping is the train step's matter.

    Args:
        config: name, lr, weight_decay, schedule and so on.
        batch_size: images in one step, over all devices.
        total_steps: steps in the whole run.
        params: the parameters or their shapes, to tell the groups apart.
        thaw_step: from this step on the parameters that config.freeze names are
            trained too; 0 = never.

    Raises:
        ValueError: if config.name or config.schedule is unknown.
        UserError: as `finetune.frozen_parameters` and `finetune.lr_factors`; more
            steps than there are numbers for.
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optim.name = {config.name!r}: must be one of {OPTIMIZERS}")
    if total_steps >= 2**31:  # a step is an int32
        raise UserError(
            f"config.epochs: a run of {total_steps} steps is longer than 2147483647; "
            "lower it"
        )
    if config.schedule not in SCHEDULES:
        raise ValueError(
            f"optim.schedule = {config.schedule!r}: must be one of {SCHEDULES}"
        )
    learning_rate = _learning_rate(config, batch_size, total_steps)
    momentum = _momentum(config, total_steps)
    factors = lr_factors(params, config.backbone_lr_factor, config.layer_decay)
    frozen = frozen_parameters(params, config.freeze)
    build = partial(_optimizer, config, learning_rate, momentum)
    if frozen is None:
        return build(params, factors)
    trained = jax.tree.map(operator.not_, frozen)
    first = build(_only(trained, params), _only(trained, factors))
    second = build(_only(frozen, params), _only(frozen, factors)) if thaw_step else None
    return _with_frozen(first, second, frozen, thaw_step)


def momentum_of(opt_state: PyTree, params: PyTree) -> PyTree:
    """The running sum of gradients that an optimiser of `make_optimizer` keeps.

    Of adamw and lamb it is the running average (first moment): shorter, but of the same
    direction. SGD's gradients have the weight decay in them.

    Args:
        opt_state: its state; that of frozen parameters has no entry in it.
        params: the parameters.

    Returns:
        A tree like `params`, 0 for what the optimiser does not move.
    """
    kinds = optax.TraceState | optax.ScaleByAdamState
    found = jax.tree.map(jnp.zeros_like, params)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if not isinstance(state, kinds):
            continue
        part = state.trace if isinstance(state, optax.TraceState) else state.mu
        found = jax.tree.map(
            lambda new, old: old if new is None else new,
            part,
            found,
            is_leaf=lambda x: x is None,
        )
    return found


def _optimizer(
    config: ConfigDict,
    learning_rate: Schedule,
    momentum: Schedule,
    params: PyTree,
    factors: PyTree | None,
) -> Optimizer:
    """The rule of `config` for all of `params`; see `finetune.lr_factors`."""
    is_bias, is_decayed = parameter_groups(params, config.decay_bias_and_norm)

    def chain(lr: Any, mu: Any) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(config.weight_decay, mask=is_decayed)
        if config.name == "sgd":
            # L2: the decay enters the gradient before the momentum. As in PyTorch
            # the learning rate is outside it: buffer = mu * buffer + gradient,
            # weight -= lr * buffer.
            rule = [decay, optax.trace(mu, nesterov=config.nesterov)]
        else:
            adam = optax.scale_by_adam(b1=mu, b2=config.b2, eps=config.eps)
            rule = [adam, decay]  # decoupled: the decay is not rescaled by Adam
            if config.name == "lamb":
                rule.append(optax.scale_by_trust_ratio())
        rule.append(optax.masked(optax.scale(config.bias_lr_factor), is_bias))
        if factors is not None:
            rule.append(_scale_each(factors))
        return optax.chain(*rule, optax.scale(-lr))

    def init(params: PyTree) -> PyTree:
        return chain(0.0, 0.0).init(params)  # the state does not depend on the values

    def update(
        grads: PyTree, opt_state: PyTree, params: PyTree, step: Any
    ) -> tuple[PyTree, PyTree]:
        # optax's transformations take traced numbers as well as constants, so the
        # chain is simply built with this step's values. The cast keeps a float32
        # state float32 where float64 is enabled.
        dtype = jax.tree.leaves(params)[0].dtype
        lr = jnp.asarray(learning_rate(step), dtype)
        mu = jnp.asarray(momentum(step), dtype)
        return chain(lr, mu).update(grads, opt_state, params)

    return Optimizer(init, update, learning_rate)


def _with_frozen(
    first: Optimizer, second: Optimizer | None, frozen: PyTree, thaw_step: int
) -> Optimizer:
    """`first` for what is not frozen; for the rest no update, or `second` in the end.

    Each has a state of its own, without entries for the other's parameters. That of
    `second` begins at thaw_step, and with it Adam's correction of its first moments.
    """
    trained = jax.tree.map(operator.not_, frozen)

    def init(params: PyTree) -> PyTree:
        state = first.init(_only(trained, params))
        return state if second is None else (state, second.init(_only(frozen, params)))

    def update(
        grads: PyTree, opt_state: PyTree, params: PyTree, step: Any
    ) -> tuple[PyTree, PyTree]:
        state, later = (opt_state, None) if second is None else opt_state
        updates, state = first.update(
            _only(trained, grads), state, _only(trained, params), step
        )
        still = jax.tree.map(jnp.zeros_like, _only(frozen, params))
        if second is None:
            return keep(still, updates, frozen), state
        new = second.update(_only(frozen, grads), later, _only(frozen, params), step)
        others, later = jax.tree.map(
            lambda a, b: jnp.where(step >= thaw_step, a, b), new, (still, later)
        )
        return keep(others, updates, frozen), (state, later)

    return Optimizer(init, update, first.learning_rate)


def _only(chosen: PyTree, tree: PyTree | None) -> PyTree:
    """`tree` without the arrays that are not chosen (None, a tree of nothing)."""
    if tree is None:
        return None
    return jax.tree.map(lambda c, x: x if c else None, chosen, tree)


def _scale_each(factors: PyTree) -> optax.GradientTransformation:
    """Every update times its own factor."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)
    )


def _learning_rate(config: ConfigDict, batch_size: int, total_steps: int) -> Schedule:
    peak = config.lr
    if config.lr_reference_batch:
        peak = peak * batch_size / config.lr_reference_batch
    if config.schedule == "one_cycle":
        return one_cycle(
            peak,
            total_steps,
            config.pct_start,
            config.div_factor,
            config.final_div_factor,
        )
    if config.schedule == "cosine":
        return cosine(peak, total_steps, config.pct_start)
    return constant(peak)


def _momentum(config: ConfigDict, total_steps: int) -> Schedule:
    if config.schedule == "one_cycle" and config.cycle_momentum:
        return one_cycle_momentum(total_steps, config.pct_start)
    return constant(config.momentum if config.name == "sgd" else config.b1)


def _two_cosines(
    total_steps: int, pct_start: float, start: float, middle: float, end: float
) -> Schedule:
    """start -> middle at step pct_start * total_steps - 1 -> end at the last step."""
    _check(total_steps, pct_start)
    turn = pct_start * total_steps - 1
    last = total_steps - 1

    def schedule(step: Any) -> Any:
        xp = _numpy_of(step)
        step = xp.clip(step, 0, last)
        # Either part may be empty: a run that rises over one step is at its peak.
        risen = step / turn if turn > 0 else 1.0
        left = (last - step) / (last - turn) if last > turn else 1.0
        return xp.where(
            step <= turn,
            start + (middle - start) * _half_cosine(xp, risen),
            end + (middle - end) * _half_cosine(xp, left),
        )

    return schedule


def _half_cosine(xp: Any, x: Any) -> Any:
    """0 -> 1 over x in [0, 1]: (1 - cos(pi x)) / 2, without its cancellation near 0."""
    return xp.sin(np.pi / 2 * x) ** 2


def _numpy_of(step: Any) -> Any:
    return jnp if isinstance(step, jax.Array) else np


def _check(total_steps: int, pct_start: float) -> None:
    if not total_steps >= 1 or total_steps % 1:
        raise ValueError(
            f"total_steps = {total_steps}: must be a whole number of at least 1"
        )
    if not 0 <= pct_start <= 1:
        raise ValueError(f"pct_start = {pct_start}: must be between 0 and 1")
