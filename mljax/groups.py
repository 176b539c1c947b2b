"""The same computation on each of several equal parts of a batch, and its mean."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mljax.errors import UserError
from mljax.sharding import AXES

PyTree = Any
# (params, batch_stats, images, labels, two keys) -> (loss, gradient, batch statistics)
Passes = Callable[..., tuple[jax.Array, PyTree, PyTree]]


def over_devices(groups: int, mesh: Mesh, is_mean: bool) -> Callable[[Passes], Passes]:
    """Makes of a computation on a batch one on `groups` parts of it.

    Part i is the i-th of `groups` equal runs of rows. Parts that lie on devices of
    their own (one, or those that share a place on the axis "data") are computed at
    once, with nothing sent between them but the results; parts that share devices one
    after the other. So the numbers do not depend on the devices.

    Args:
        groups: how many parts.
        mesh: over all of which the batch is split along its first dimension.
        is_mean: whether losses are means over the batch, and not sums.

    Returns:
        f -> g, with g(params, batch_stats, images, labels, first_key, second_key) the
        sums (means if `is_mean`) of the losses and gradients of f over the parts, and
        the means of their batch statistics. Each part has keys of its own. Parameters
        are expected whole on every device.

    Raises:
        UserError: the parts would be cut by the borders between devices.
    """
    axes: tuple[str, ...] = AXES
    if groups % mesh.size:
        axes = AXES[:1]
    apart = math.prod(mesh.shape[axis] for axis in axes)
    if groups % apart:
        raise UserError(
            f"config.sam.groups = {groups}: must be a multiple of the {mesh.size} "
            f"devices or of config.mesh.data = {apart}; for groups of several devices "
            f"set config.mesh.data={groups} --config.mesh.fsdp=-1"
        )
    here = groups // apart  # one after the other
    rows, whole = P(axes), P()

    def change(f: Passes) -> Passes:
        def of_devices(
            params: PyTree,
            stats: PyTree,
            images: Any,
            labels: Any,
            which: Any,
            *keys: Any,
        ) -> PyTree:
            size = images.shape[0] // here
            total: PyTree = ()
            for i in range(here):
                own = slice(i * size, (i + 1) * size)
                own_keys = [jax.random.fold_in(key, which[i]) for key in keys]
                loss, gradient, new = f(
                    params, stats, images[own], labels[own], *own_keys
                )
                # How far they move: what stays the same keeps its bits.
                part = loss, gradient, jax.tree.map(jnp.subtract, new, stats)
                total = jax.tree.map(jnp.add, total, part) if i else part
            return lax.psum(total, axes)

        def on_all(
            params: PyTree, stats: PyTree, images: Any, labels: Any, *keys: Any
        ) -> tuple[jax.Array, PyTree, PyTree]:
            total = jax.shard_map(
                of_devices,
                mesh=mesh,
                in_specs=(whole, whole, rows, rows, rows, *(whole for _ in keys)),
                out_specs=whole,
                axis_names=set(axes),
                check_vma=False,  # else gradients are summed over parts too early
            )(params, stats, images, labels, jnp.arange(groups), *keys)
            mean = jax.tree.map(lambda x: x / groups, total)
            loss, gradient, _ = mean if is_mean else total
            return loss, gradient, jax.tree.map(jnp.add, stats, mean[2])

        return on_all

    return change
