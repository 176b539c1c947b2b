"""What deep backbones share: rows of blocks, stochastic depth, rematerialisation."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx


def residual(
    x: jax.Array, y: jax.Array, drop_path: float, train: bool, rngs: nnx.Rngs | None
) -> jax.Array:
    """x + y, with stochastic depth (Huang et al. 2016, arXiv 1603.09382) in training.

    Then the branch y [batch, ...] is left out for a share `drop_path` of the images,
    and is scaled by 1 / (1 - drop_path) for the others. Raises ValueError where it
    would leave something out and there is no `rngs`.
    """
    if not train or drop_path == 0:
        return x + y
    if rngs is None:
        raise ValueError("stochastic depth in training needs rngs=nnx.Rngs(...)")
    each_image = (len(y),) + (1,) * (y.ndim - 1)
    keep = jax.random.bernoulli(rngs.dropout(), 1 - drop_path, each_image)
    return x + jnp.where(keep, y / (1 - drop_path), 0)


class Blocks(nnx.Module):
    """Blocks run one after the other; they are named "0", "1", ... as in torch.

    A block is called with (x, train, rngs). remat: the backward pass computes what is
    inside a block again instead of keeping it (Chen et al. 2016, arXiv 1604.06174):
    less memory, a third more arithmetic, the same numbers. (On XLA's CPU backend the
    compiled program took no less memory.)
    """

    def __init__(self, blocks: Iterable[nnx.Module], remat: bool = False):
        self.length = 0
        for block in blocks:
            setattr(self, str(self.length), block)
            self.length += 1
        self.remat = remat

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        for i in range(self.length):
            block = getattr(self, str(i))
            x = (run_again if self.remat else run_once)(block, x, train, rngs)
        return x


def run_once(
    block: nnx.Module, x: jax.Array, train: bool, rngs: nnx.Rngs | None
) -> jax.Array:
    return block(x, train, rngs)


def run_again(
    block: nnx.Module, x: jax.Array, train: bool, rngs: nnx.Rngs | None
) -> jax.Array:
    """block(x, train, rngs) under `jax.checkpoint`.

    The block goes in and out as arrays. What it changes (BatchNorm statistics and the
    random counters) comes out with its result and is put back once, whatever number of
    times it is computed.
    """
    nodes = (block, rngs)
    graph, state = nnx.split(nodes)

    @jax.checkpoint
    def compute(state: nnx.State, x: jax.Array):
        block, rngs = nnx.merge(graph, state)
        y = block(x, train, rngs)
        return y, nnx.state((block, rngs), nnx.Not(nnx.Param))

    y, changed = compute(state, x)
    nnx.update(nodes, changed)
    return y
