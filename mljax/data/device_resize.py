"""Resizing on the device: what the host decoded, in a corner of a canvas -> one size.

On the host, resizing takes as long as decoding a small JPEG. Here it is two products
with matrices a picture: 1.9 GFLOP from 640 pixels to 448, beside 145 of a training step
of EfficientNetV2-S with SAM. A canvas of 640 has twice the bytes of a picture of 448.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mljax.images import GREY, sides_of

# (images uint8 [batch, canvas, canvas, 3], sizes int32 [batch, 2]: height and width of
# what lies in the upper left corner) -> uint8 [batch, height, width, 3]
Resize = Callable[[jax.Array, jax.Array], jax.Array]


def make_resize(data_config: ConfigDict) -> Resize:
    """To `data_config.image_size`, by `resize`, `antialias` and `fit` as on the host.

    The pixels are those of `mljax.images.resize` up to rounding; not those of pictures
    that are larger than the canvas, which are resized twice.
    """
    target = sides_of(data_config)
    letterbox = data_config.fit == "letterbox"
    kind = "wide" if data_config.antialias else "bilinear"
    if data_config.resize == "area":
        kind = "area"

    def resize(images: jax.Array, sizes: jax.Array) -> jax.Array:
        goals = jnp.broadcast_to(jnp.array(target, jnp.int32), sizes.shape)
        if letterbox:
            others = sizes[:, ::-1]
            kept = (sizes * goals[:, ::-1] + others // 2) // others
            goals = jnp.clip(kept, 1, goals)
        rows, columns = (
            _weights(sizes[:, i], goals[:, i], images.shape[1 + i], target[i], kind)
            for i in range(2)
        )
        # The pixels are exact in bfloat16, the weights are not. For HIGH a TPU adds up
        # three products in bfloat16; a GPU takes TF32, which is too short.
        on_gpu = jax.default_backend() == "gpu"
        precision = jax.lax.Precision.HIGHEST if on_gpu else jax.lax.Precision.HIGH
        product = partial(jnp.einsum, precision=precision)
        values = product("byh,bhwc->bywc", rows, images.astype(jnp.float32))
        values = product("bxw,bywc->byxc", columns, values)
        if letterbox:
            inside = rows.sum(2)[:, :, None, None] * columns.sum(2)[:, None, :, None]
            values += GREY * (1 - inside)
        return jnp.round(values).astype(jnp.uint8)

    return resize


def _weights(
    length: jax.Array, goal: jax.Array, canvas: int, target: int, kind: str
) -> jax.Array:
    """float32 [batch, target, canvas]: the share of each old pixel in each new one.

    Args:
        length: int32 [batch], how many of the canvas are the picture.
        goal: int32 [batch], how many it is to become, in the middle of the target.
        kind: as in `mljax.images`: "bilinear", "wide" (with antialiasing), "area".
    """
    length, goal = (x[:, None, None] for x in (length, goal))
    ratio = length.astype(jnp.float32) / goal
    new = jnp.arange(target)[None, :, None] - (target - goal) // 2
    old = jnp.arange(canvas)
    if kind == "area":
        covered_to = jnp.minimum((new + 1) * ratio, old + 1)
        weights = jnp.maximum(0, covered_to - jnp.maximum(new * ratio, old))
    else:
        reach = jnp.maximum(ratio, 1) if kind == "wide" else 1.0
        distance = jnp.abs(old + 0.5 - (new + 0.5) * ratio) / reach
        weights = jnp.maximum(0, 1 - distance)
    weights = jnp.where((old < length) & (new >= 0) & (new < goal), weights, 0)
    total = weights.sum(2, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
