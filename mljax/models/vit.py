"""Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), with timm's names.

The plain ViT-Ti/16, ViT-S/16 and ViT-B/16 of "How to train your ViT" (Steiner et al.
2021, arXiv 2106.10270): timm's `vit_{tiny,small,base}_patch16_224` with their many
public weights (augreg, dino, mae).

Position embeddings are learned on a grid of 224 / 16 = 14 x 14 patches. They are
resized, bicubic with antialiasing, as timm does: in the network, when an image has
another size than `image_size`, and when loading a file for another size. So weights
for 224 pixels work at 448 as they are.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mljax.errors import UserError
from mljax.models import cpu
from mljax.models.blocks import Blocks, residual
from mljax.models.layers import Conv, LayerNorm, at_least_float32, constant, draw

PATCH = 16  # pixels along a side
EPS = 1e-6  # of LayerNorm


def resize_positions(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Position embeddings for a grid of other size: bicubic, with antialiasing.

    positions: [1, 1 + n * n, dim], the class token's first, then n x n by rows. Returns
    [1, 1 + grid[0] * grid[1], dim], the same array if nothing changes.
    """
    _, tokens, dim = positions.shape
    side = math.isqrt(tokens - 1)
    if grid == (side, side):
        return positions
    square = positions[:, 1:].reshape(1, side, side, dim)
    square = jax.image.resize(square, (1, *grid, dim), "bicubic", antialias=True)
    return jnp.concatenate([positions[:, :1], square.reshape(1, -1, dim)], 1)


class Linear(nnx.Module):
    """x @ weight + bias; weight [inputs, outputs] drawn N(0, 0.02^2), bias zero."""

    torch_axes = {"weight": (1, 0)}

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(draw(rngs, "normal", (inputs, outputs), 0.02, dtype))
        self.bias = nnx.Param(constant(0, outputs, dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, weight = x.astype(self.dtype), self.weight[...].astype(self.dtype)
        return cpu.product(x, weight) + self.bias[...].astype(self.dtype)


class Attention(nnx.Module):
    """Each token gathers from all: [batch, tokens, dim] -> the same shape."""

    def __init__(self, dim: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, dim = x.shape
        shape = batch, tokens, self.heads, dim // self.heads
        q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, axis=-1))
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk",
            q / math.sqrt(q.shape[-1]),
            k,
            preferred_element_type=at_least_float32(x.dtype),
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.proj(mixed.reshape(batch, tokens, dim))


class Mlp(nnx.Module):
    """To four times the width, GELU (exact), and back."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Attention, then an MLP, each on a normalised input and beside a skip."""

    def __init__(
        self,
        dim: int,
        heads: int,
        drop_path: float,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = LayerNorm(dim, eps=EPS, dtype=dtype)
        self.attn = Attention(dim, heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, eps=EPS, dtype=dtype)
        self.mlp = Mlp(dim, dtype=dtype, rngs=rngs)
        self.drop_path = drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.attn(self.norm1(x))
        x = residual(x, y, self.drop_path, train, rngs)
        y = self.mlp(self.norm2(x))
        return residual(x, y, self.drop_path, train, rngs)


class PatchEmbed(nnx.Module):
    """16 x 16 patches to tokens: [b, H, W, 3] -> [b, H / 16, W / 16, dim]."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(stride=PATCH, bias=True, uniform=True)
        self.proj = Conv(3, dim, PATCH, **options, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.proj(images)


class VisionTransformer(nnx.Module):
    """images [batch, H, W, 3] -> map [batch, H / 16, W / 16, dim].

    The map is the patch tokens after the last LayerNorm. The class token takes part in
    the attention and is not in the map; timm's own classifier looks at it alone. H and
    W are divisible by 16 (UserError otherwise).

    Args:
      image_size: pixels along a side for which the position embeddings are stored.
      drop_path: stochastic depth. The rate grows from 0 for the first block to this
        one for the last.
      remat: compute blocks again in the backward pass instead of keeping them.
    """

    head_hidden = 0  # no layer between pooling and classifier
    head_activation = "relu"
    classifier = "head"  # timm's name of a last layer on this backbone

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        depth: int = 12,
        image_size: int = 224,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if image_size % PATCH:
            raise ValueError(f"image_size = {image_size}: must be divisible by {PATCH}")
        self.side = image_size // PATCH
        shape = (1, 1 + self.side**2, dim)
        self.cls_token = nnx.Param(draw(rngs, "normal", (1, 1, dim), 1e-6, dtype))
        self.pos_embed = nnx.Param(draw(rngs, "normal", shape, 0.02, dtype))
        self.patch_embed = PatchEmbed(dim, dtype=dtype, rngs=rngs)
        self.blocks = Blocks(
            [
                Block(dim, heads, rate, dtype=dtype, rngs=rngs)
                for rate in np.linspace(0, drop_path, depth).tolist()
            ],
            remat,
        )
        self.norm = LayerNorm(dim, eps=EPS, dtype=dtype)
        self.num_features, self.dtype = dim, dtype

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        if images.shape[1] % PATCH or images.shape[2] % PATCH:
            raise UserError(
                f"ViT needs images whose sides are divisible by {PATCH}, not "
                f"{images.shape[1]} x {images.shape[2]}: change config.data.image_size"
            )
        patches = self.patch_embed(images)
        batch, height, width, dim = patches.shape
        token = self.cls_token[...].astype(self.dtype)
        x = patches.reshape(batch, height * width, dim)
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, dim)), x], 1)
        positions = resize_positions(self.pos_embed[...], (height, width))
        x = self.blocks(x + positions.astype(self.dtype), train, rngs)
        return self.norm(x[:, 1:]).reshape(batch, height, width, dim)

    def adapt(self, state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Also takes weights for another image size, if it is square."""
        positions = state_dict.get("pos_embed", np.zeros(0))
        if positions.ndim != 3:
            return state_dict
        tokens = positions.shape[1] - 1
        if math.isqrt(tokens) in (self.side, 0) or math.isqrt(tokens) ** 2 != tokens:
            return state_dict
        resized = resize_positions(jnp.asarray(positions), (self.side, self.side))
        return {**state_dict, "pos_embed": np.asarray(resized)}


def vit_tiny_patch16_224(**options) -> VisionTransformer:
    """timm's `vit_tiny_patch16_224`; options as in VisionTransformer."""
    return VisionTransformer(192, 3, **options)


def vit_small_patch16_224(**options) -> VisionTransformer:
    """timm's `vit_small_patch16_224`; options as in VisionTransformer."""
    return VisionTransformer(384, 6, **options)


def vit_base_patch16_224(**options) -> VisionTransformer:
    """timm's `vit_base_patch16_224`; options as in VisionTransformer."""
    return VisionTransformer(768, 12, **options)
