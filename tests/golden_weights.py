"""The rule by which the golden numbers' backbone weights are drawn."""

import zlib

import numpy as np


def golden_weights(
    shapes: dict[str, tuple[int, ...]], gain: float
) -> dict[str, np.ndarray]:
    """Name -> float32 array: the same for every implementation with these names."""
    weights = {}
    for name, shape in shapes.items():
        n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_mean") or name.endswith("bias"):
            value = 0.1 * n
        elif name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(n)
        elif len(shape) >= 2:
            value = n * np.sqrt(gain / np.prod(shape[1:]))
        else:
            value = 1 + 0.1 * n
        weights[name] = value.astype(np.float32)
    return weights
