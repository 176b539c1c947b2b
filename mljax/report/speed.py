"""What a prediction costs on this machine, measured."""

import math
import time
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mljax.images import sides_of

SIZES = (1, 32)  # images in a batch
_SECONDS = 2.0  # of measuring at each size, at least five times and at most fifty


class Costs(NamedTuple):
    """Attributes:
    parameters: numbers in the network, graph and random constants apart.
    weights: bytes of all its arrays.
    milliseconds: a batch, the median, for each of SIZES.
    activations: bytes that the program takes beside weights and images, for each.
    device: what it ran on.
    """

    parameters: int
    weights: int
    milliseconds: tuple[float, ...]
    activations: tuple[int | None, ...]
    device: str


def measure(model: Any, config: ConfigDict) -> Costs:
    """Times `model` (folded) on images of its size, uint8 in and probabilities out."""
    import jax

    from mljax import losses
    from mljax.data.augment import normalise
    from mljax.models.functional import as_function, split
    from mljax.step import make_eval_step

    outputs_of = make_eval_step(as_function(model), normalise, flip=config.eval.flip)
    weights = split(model)
    device = jax.local_devices()[0]
    weights = jax.device_put(weights, device)

    @jax.jit
    def run(weights: Any, images: jax.Array) -> jax.Array:
        params, batch_stats = weights
        outputs = outputs_of(params, batch_stats, images)
        return losses.probabilities(outputs, config.loss)

    milliseconds, activations = [], []
    sides = sides_of(config.data)
    for size in SIZES:
        images = jax.device_put(np.zeros((size, *sides, 3), np.uint8), device)
        program = run.lower(weights, images).compile()
        analysis = program.memory_analysis()
        activations.append(analysis.temp_size_in_bytes if analysis else None)
        program(weights, images).block_until_ready()
        times: list[float] = []
        while len(times) < 5 or (sum(times) < _SECONDS and len(times) < 50):
            start = time.perf_counter()
            program(weights, images).block_until_ready()
            times.append(time.perf_counter() - start)
        milliseconds.append(1000 * float(np.median(times)))
    params, _ = weights
    return Costs(
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        weights=sum(x.nbytes for x in jax.tree.leaves(weights)),
        milliseconds=tuple(milliseconds),
        activations=tuple(activations),
        device=device.device_kind,
    )
