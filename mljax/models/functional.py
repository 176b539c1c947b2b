"""Modules as pure functions of plain nested dicts, for `jax.jit`, SAM, EMA, Orbax.

`nnx.jit` costs milliseconds of Python a step, and an NNX State closed over inside a
gradient raises; plain dicts do neither.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

# The keys of every tree of two networks that are trained at once (`mljax.mutual`).
NETWORKS = ("one", "two")

Tree = dict[str, Any]
Apply = Callable[..., tuple[jax.Array, Tree]]


def split(module: nnx.Module) -> tuple[Tree, Tree]:
    """(params, batch_stats) of a module as nested dicts, e.g. after loading weights."""
    params, batch_stats = nnx.state(module, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def merge(module: nnx.Module, params: Tree, batch_stats: Tree) -> nnx.Module:
    """A module like `module` with these values, e.g. to export trained weights."""
    graph, *_ = nnx.split(module, nnx.Param, nnx.BatchStat)
    return nnx.merge(graph, params, batch_stats)


def functional(
    make_model: Callable[[], nnx.Module],
) -> tuple[Apply, Callable[[], tuple[Tree, Tree]]]:
    """(apply, init) of the model that `make_model()` builds.

    make_model takes no argument and makes its own nnx.Rngs, so that tracing it once
    for its structure leaves nothing behind.

    init() -> (params, batch_stats)
    apply(params, batch_stats, images, *, train=False, rng=None)
      -> (outputs, new batch_stats); images [batch, H, W, 3] normalised, outputs
      [batch, num_classes] float32, rng a key for dropout. Differentiable (in
      reverse mode) and jit-able; batch_stats change in training only.
    """

    def init() -> tuple[Tree, Tree]:
        return split(make_model())

    return as_function(nnx.eval_shape(make_model)), init


def as_function(module: nnx.Module) -> Apply:
    """The `apply` of `functional` for a module, whatever its own values."""
    graph, *_ = nnx.split(module, nnx.Param, nnx.BatchStat)

    def apply(
        params: Tree,
        batch_stats: Tree,
        images: jax.Array,
        *,
        train: bool = False,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        model = nnx.merge(graph, params, batch_stats)
        rngs = None if rng is None else nnx.Rngs(rng)
        outputs = model(images, train=train, rngs=rngs)
        return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return apply
