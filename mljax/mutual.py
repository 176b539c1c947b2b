"""Deep mutual learning: two networks learn from the labels and from each other.

Both have the same architecture, other random weights and other dropout. Each of the
trees of a pair (parameters, batch statistics, outputs) is a dict with the two names of
`NETWORKS`, so that state, EMA and checkpoints hold a pair as they hold one network.

References:
    Zhang et al., "Deep Mutual Learning" (2018), arXiv 1706.00384; for independent
    labels as in Prokofiev & Sovrasov, arXiv 2209.06585.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid
from ml_collections import ConfigDict

from mljax.errors import UserError
from mljax.models import Classifier, pretrained
from mljax.models.functional import NETWORKS
from mljax.models.layers import at_least_float32

Tree = dict[str, Any]


def pair(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` (see `models.functional`) of both networks, on the same images.

    The first draws the random numbers that it would draw alone.
    """

    def apply_both(
        params: Tree,
        batch_stats: Tree,
        images: jax.Array,
        *,
        train: bool = False,
        rng: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], Tree]:
        second = None if rng is None else jax.random.fold_in(rng, 1)
        outputs, stats = {}, {}
        for name, key in zip(NETWORKS, (rng, second), strict=True):
            outputs[name], stats[name] = apply(
                params[name], batch_stats[name], images, train=train, rng=key
            )
        return outputs, stats

    return apply_both


def make_loss(
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    weight: float,
    scale: float,
    batch_size: int | None = None,
) -> Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]:
    """The loss of a pair: of each its own loss_fn + weight * mean KL(other || own).

    The two are added up. What the other says is a constant for each, so that the
    gradient of either network is that of its own loss.

    Args:
        loss_fn: (outputs [batch, num_classes], labels) -> scalar.
        weight: of the divergence, see `mean_kl`.
        scale: logits are scale * outputs (1, or the s of `aam`).
        batch_size: where the losses of parts of the batch are added up, the images of
            all of it: the divergence of a part counts by its share of them. With labels
            of -1 it is the mean over those of its own part that are known.

    Returns:
        loss({"one": outputs, "two": outputs}, labels [batch, num_classes]) -> scalar.
    """

    def of_one(own: jax.Array, other: jax.Array, labels: jax.Array) -> jax.Array:
        said = jax.lax.stop_gradient(other)
        divergence = mean_kl(scale * said, scale * own, labels)
        share = own.shape[0] / batch_size if batch_size else 1.0
        return loss_fn(own, labels) + weight * share * divergence

    def loss(outputs: Mapping[str, jax.Array], labels: jax.Array) -> jax.Array:
        one, two = (outputs[name] for name in NETWORKS)
        return of_one(one, two, labels) + of_one(two, one, labels)

    return loss


def mean_kl(target: jax.Array, own: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean KL(Bern(p) || Bern(q)) with p = sigmoid(target) and q = sigmoid(own).

    Args:
        target, own: logits [batch, num_classes].
        labels: [batch, num_classes]; where they are -1 the entry does not count.

    Returns:
        The mean over the annotated entries, a scalar in float32 at least; 0 if there
        are none.
    """
    target = target.astype(at_least_float32(target.dtype))
    own = own.astype(at_least_float32(own.dtype))
    p = jax.nn.sigmoid(target)
    present = p * (log_sigmoid(target) - log_sigmoid(own))
    absent = (1 - p) * (log_sigmoid(-target) - log_sigmoid(-own))
    known = labels >= 0
    total = jnp.sum(jnp.where(known, present + absent, 0))
    return total / jnp.maximum(jnp.count_nonzero(known), 1)


def load(
    config: ConfigDict,
    make_model: Callable[..., Classifier],
    class_names: Sequence[str],
    init_from: str,
) -> tuple[Tree, Tree, list[str]]:
    """What the run starts from: see `pretrained.load`; two of them for a pair.

    Args:
        config: `seed` and `mutual.weight` are read.
        make_model: (seed) -> the model with random weights.
        class_names: of this run.
        init_from: as `config.init_from`.

    Raises:
        UserError: as `pretrained.load`, or `init_from` leaves nothing at random, so
            that both networks would be the same.
    """
    params, batch_stats, notes = pretrained.load(init_from, make_model, class_names)
    if not config.mutual.weight:
        return params, batch_stats, notes
    params_two, stats_two, _ = pretrained.load(
        init_from, partial(make_model, config.seed + 1), class_names
    )
    same = jax.tree.map(np.array_equal, params, params_two)
    if all(jax.tree.leaves(same)):
        raise UserError(
            f"config.init_from = {init_from}: gives both networks of "
            "config.mutual the same weights, so they have nothing to learn from each "
            "other; start from weights without a classifier, or of other classes"
        )
    both = (params, params_two), (batch_stats, stats_two)
    params, batch_stats = (dict(zip(NETWORKS, x, strict=True)) for x in both)
    return params, batch_stats, notes
