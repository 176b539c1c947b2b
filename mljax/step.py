"""The train step and the eval step: SAM, EMA, accumulation, clipping, bad steps.

Both are plain functions of a state and a batch; the caller jits them:

    train_step = jax.jit(make_train_step(...), donate_argnums=0)
    state, metrics = train_step(state, batch)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mljax import sam
from mljax.finetune import hold, keep
from mljax.optim import Optimizer, momentum_of

PyTree = Any
Metrics = dict[str, jax.Array]
# (params, batch_stats, images, train=..., rng=...) -> (outputs, new batch_stats)
Apply = Callable[..., tuple[Any, PyTree]]
# (uint8 images, labels, rng) -> (float images, labels), for training
Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# uint8 images -> float images, for evaluation
Preprocess = Callable[[jax.Array], jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes and a checkpoint keeps.

    The fields `ema_params` and `ema_batch_stats` are None where there is no EMA,
    `sam_direction` where no step uses SAM's direction of an earlier one.
    """

    step: jax.Array  # int32: steps done, the skipped ones too
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema_params: PyTree
    ema_batch_stats: PyTree
    skipped: jax.Array  # int32: non-finite steps so far
    skipped_in_row: jax.Array  # int32: non-finite steps since the last good one
    sam_direction: PyTree = None  # `sam.apart` of the last full step


def create_state(
    params: PyTree,
    batch_stats: PyTree,
    optimizer: Optimizer,
    use_ema: bool,
    keep_direction: bool = False,
) -> TrainState:
    """A state at step 0, in which no two arrays share memory: it may be donated.

    Args:
        params: nested dict of arrays.
        batch_stats: nested dict of arrays, {} for a model without BatchNorm.
        optimizer: from `make_optimizer`.
        use_ema: keep averages of both, which start as copies of them.
        keep_direction: full SAM steps leave their direction for those in between.
    """

    def copy(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    params, batch_stats = copy(params), copy(batch_stats)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=copy(params) if use_ema else None,
        ema_batch_stats=copy(batch_stats) if use_ema else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        sam_direction=jax.tree.map(jnp.zeros_like, params) if keep_direction else None,
    )


def make_train_step(
    apply: Apply,
    loss_fn: Callable[[Any, jax.Array], jax.Array],
    optimizer: Optimizer,
    augment: Augment,
    *,
    reduction: str,
    seed: int | jax.Array,
    sam_rho: float = 0.0,
    sam_adaptive: bool = False,
    sam_update_stats: str = "both",
    sam_groups: Callable[[Any], Any] | None = None,
    sam_every_images: int = 1,
    sam_by_momentum: bool = False,
    sam_reuse: float = 0.0,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    frozen: PyTree | None = None,
    is_pair: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """One optimisation step: gradients, SAM, clipping, update, EMA.

    A step whose loss, gradient or batch statistics are not finite changes nothing but
    the counters. Random numbers depend on (seed, step) alone.

    Args:
        apply: the model, see `Apply`.
        loss_fn: (outputs [batch, num_classes], labels [batch, num_classes]) -> scalar.
        optimizer: from `make_optimizer`.
        augment: see `Augment`; runs once a step on the whole batch, so both passes of
            SAM see the same images and labels.
        reduction: how `loss_fn` reduces over the batch, "sum" or "mean": tells how the
            parts of an accumulated batch are put together.
        seed: of dropout and augmentation, at least 0 and below 2^31. A traced int32
            scalar makes it an input of the program, with the same random numbers.
        sam_rho: length of SAM's perturbation; 0 = no SAM (one pass).
        sam_adaptive: perturb each weight in proportion to its square (ASAM).
        sam_update_stats: which passes move the batch statistics, "both" or "first".
        sam_groups: from `groups.over_devices`, for m-sharpness: each part of the batch
            has a perturbation of its own; None = that of the whole batch.
        sam_every_images: SAM's first pass sees every so many-th image, in as few parts
            as are no larger than those of the second pass. It normalises by that
            part's own statistics, and moves the running ones by them as any first
            pass does: mean and (unbiased) variance of fewer images are noisier, but
            not off, and running averages smooth that.
        sam_by_momentum: perturb along the optimiser's momentum, in one pass, see
            `sam.look_ahead`.
        sam_reuse: with sam_rho = 0: a step in between, which adds the state's
            `sam_direction` with this weight, see `sam.reuse`. Steps with SAM renew the
            direction where the state has one. Two programs, of which the caller takes
            one by the step's number, and not lax.cond: on the CPU backend gradients of
            convolutions are slow in control flow (in lax.scan about 60 times).
        ema_decay: per step; 0 = no EMA (as `create_state` with use_ema=False).
        accumulate: the batch is run in this many parts, one after the other. The
            gradient is that of the whole batch, except that BatchNorm sees one part
            at a time.
        clip_norm: largest global norm of the gradient that is used; 0 = no clipping.
        frozen: which parameters stay as they are, from `frozen_parameters`; SAM does
            not perturb them. `apply` decides about their batch statistics.
        is_pair: two networks are trained, see `mljax.mutual`; SAM and clipping take
            the norm of each.
        mesh: where parameters are sharded; they are gathered for the computation.

    Returns:
        step(state, batch) -> (state, metrics). The batch has `image` uint8
        [batch, height, width, 3] and `labels` [batch, num_classes]. The metrics are
        scalars: loss (with SAM that of the second pass; of a pair the sum of both),
        learning_rate, grad_norm (before clipping), finite (bool), skipped,
        skipped_in_row.

    Raises:
        ValueError: if reduction or sam_update_stats is unknown, or, in the step, if
            the batch cannot be divided into `accumulate` parts.

    References:
        Foret et al., "Sharpness-Aware Minimization" (2021), algorithm 1 and section 4.1
        (m-sharpness), arXiv 2010.01412. The other forms: `mljax.sam`.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction = {reduction!r}: must be "sum" or "mean"')
    if sam_update_stats not in ("both", "first"):
        raise ValueError(
            f'sam_update_stats = {sam_update_stats!r}: must be "both" or "first"'
        )

    def each(f: Callable[..., PyTree], *trees: PyTree) -> PyTree:
        if not is_pair:
            return f(*trees)
        return {name: f(*(tree[name] for tree in trees)) for name in trees[0]}

    @jax.jit  # traced once for all parts and both passes; inlined where it is called
    def part_gradient(
        params: PyTree, batch_stats: PyTree, images: Any, labels: Any, rng: Any
    ) -> tuple[jax.Array, PyTree, PyTree]:
        def loss_of(params: PyTree) -> tuple[jax.Array, PyTree]:
            whole = hold(params, frozen)
            if sam_groups is None:
                whole = _gathered(whole, mesh)
            outputs, stats = apply(whole, batch_stats, images, train=True, rng=rng)
            return loss_fn(outputs, labels), stats

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, grads, stats

    def gradient(
        params: PyTree,
        batch_stats: PyTree,
        images: Any,
        labels: Any,
        rng: Any,
        parts: int = accumulate,
    ) -> tuple[jax.Array, PyTree, PyTree]:
        """Loss and gradient of the batch, and the batch statistics after it."""
        images, labels = _parts(images, parts), _parts(labels, parts)
        total: PyTree = ()
        # A Python loop: the gradient of a convolution inside lax.scan is about 60
        # times slower on the CPU backend.
        for i in range(parts):
            part_images, key = images[:, i], jax.random.fold_in(rng, i)
            if i:
                # Zero, but not before the last part is done. Otherwise XLA keeps the
                # activations of all parts (on CPU even with an optimization_barrier).
                wait = 0 * optax.tree.norm(total)
                part_images += wait.astype(part_images.dtype)
            loss, grads, batch_stats = part_gradient(
                params, batch_stats, part_images, labels[:, i], key
            )
            part = (loss, grads)
            total = jax.tree.map(jnp.add, total, part) if i else part
        if reduction == "mean":
            total = jax.tree.map(lambda x: x / parts, total)
        return *total, batch_stats

    def passes(
        params: PyTree,
        batch_stats: PyTree,
        images: Any,
        labels: Any,
        *keys: Any,
        both: bool,
    ) -> tuple[jax.Array, PyTree, PyTree]:
        """`gradient`, with SAM that of the second pass.

        The gradient comes as a pair, with that of the first pass if `both`, or None.
        """
        if not sam_rho or sam_by_momentum:
            loss, grads, stats = gradient(params, batch_stats, images, labels, keys[0])
            return loss, (grads, None), stats
        _, plain, stats = gradient(
            params,
            batch_stats,
            _parts(images, sam_every_images)[:, 0],
            _parts(labels, sam_every_images)[:, 0],
            keys[0],
            parts=math.ceil(accumulate / sam_every_images),
        )
        ascend = partial(sam.ascend, rho=sam_rho, adaptive=sam_adaptive)
        nearby = each(ascend, params, plain)
        # What XLA sees to be the same in both passes it computes once.
        nearby = keep(params, nearby, frozen)
        loss, grads, second_stats = gradient(nearby, stats, images, labels, keys[1])
        if sam_update_stats == "both":
            stats = second_stats
        return loss, (grads, plain if both else None), stats

    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_key, first_key, second_key = jax.random.split(key, 3)
        images, labels = augment(batch["image"], batch["labels"], augment_key)

        start, direction = state.params, state.sam_direction
        renews = direction is not None and sam_rho > 0
        compute: Any = partial(passes, both=renews)
        if sam_rho and sam_by_momentum:
            momentum = momentum_of(state.opt_state, start)
            nearby = each(partial(sam.look_ahead, rho=sam_rho), start, momentum)
            start = keep(start, nearby, frozen)
        if sam_groups is not None:
            start, compute = _gathered(start, mesh), sam_groups(compute)
        loss, (grads, plain), stats = compute(
            start, state.batch_stats, images, labels, first_key, second_key
        )
        if renews:
            direction = each(sam.apart, grads, plain)
        elif sam_reuse:
            grads = each(partial(sam.reuse, alpha=sam_reuse), grads, direction)

        grad_norm = optax.tree.norm(grads)
        if clip_norm:
            grads = each(partial(_clip, limit=clip_norm), grads)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, state.step
        )
        params = keep(state.params, optax.apply_updates(state.params, updates), frozen)
        new = replace(
            state,
            params=params,
            batch_stats=stats,
            opt_state=opt_state,
            sam_direction=direction,
        )
        if ema_decay:
            new = replace(
                new,
                ema_params=_average(state.ema_params, params, ema_decay),
                ema_batch_stats=_average(state.ema_batch_stats, stats, ema_decay),
            )

        finite = _all_finite((loss, grad_norm, stats, updates))
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        new = replace(
            new,
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        return new, {
            "loss": loss,
            "learning_rate": jnp.asarray(optimizer.learning_rate(state.step)),
            "grad_norm": grad_norm,
            "finite": finite,
            # Here too: the state is donated to the next step before these are read.
            "skipped": new.skipped,
            "skipped_in_row": new.skipped_in_row,
        }

    return train_step


def make_eval_step(
    apply: Apply,
    preprocess: Preprocess,
    *,
    flip: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
    """(params, batch_stats, images uint8 [batch, height, width, 3]) -> outputs.

    The outputs, [batch, num_classes], are at least float32. With `flip` they are the
    mean of those (logits or cosines) for the images and for their mirror images.
    """

    def eval_step(params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        images, whole = preprocess(images), _gathered(params, mesh)

        def outputs_of(images: jax.Array) -> jax.Array:
            outputs, _ = apply(whole, batch_stats, images, train=False)
            return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))

        outputs = outputs_of(images)
        if flip:
            outputs = (outputs + outputs_of(images[:, :, ::-1])) / 2
        return outputs

    return eval_step


def half_life_decay(half_life: float, batch_size: int) -> float:
    """The EMA decay per step after which half is forgotten in `half_life` images."""
    return 0.5 ** (batch_size / half_life)


def _clip(grads: PyTree, limit: float) -> PyTree:
    # The 1e-6 is PyTorch's, so that equal settings give equal steps.
    shrink = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
    return jax.tree.map(lambda g: g * shrink, grads)


def _average(old: PyTree, new: PyTree, decay: float) -> PyTree:
    # In this form what does not change (constants among the statistics) stays exact.
    return jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), old, new)


def _gathered(params: PyTree, mesh: Mesh | None) -> PyTree:
    """Whole parameters on every device of the mesh.

    Left sharded, they would make XLA split convolutions over channels, with many
    all-to-alls, instead of over the batch.
    """
    if mesh is None:
        return params
    return jax.lax.with_sharding_constraint(
        params, NamedSharding(mesh, PartitionSpec())
    )


def _parts(x: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] -> [batch / parts, parts, ...]: part i is x[i::parts].

    Interleaved, because then a batch split over devices along its first dimension
    stays so, and each part is split over them evenly.
    """
    if x.shape[0] % parts:
        raise ValueError(f"{x.shape[0]} images cannot be run in {parts} equal parts")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:])


def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
