"""EfficientNetV2 (Tan & Le 2021, arXiv 2104.00298), as timm's `tf_` models build it.

TensorFlow's SAME padding and BatchNorm epsilon 1e-3, as in the published weights. The
map includes the last 1x1 convolution (timm's `conv_head`, `bn2` and its SiLU), so that
every size gives 1280 channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mljax.models.batch_norm import BatchNorm
from mljax.models.blocks import Blocks, residual
from mljax.models.layers import Conv, DepthwiseConv

EPS = 1e-3


class Stage(NamedTuple):
    """A row of equal blocks (Table 4 of the paper); the first one has the stride."""

    kind: str  # "conv" | "fused" (Fused-MBConv) | "mbconv"
    repeats: int
    stride: int
    expansion: int  # channels inside a block over those that enter it
    channels: int  # that leave it


SMALL = (
    Stage("conv", 2, 1, 1, 24),
    Stage("fused", 4, 2, 4, 48),
    Stage("fused", 4, 2, 4, 64),
    Stage("mbconv", 6, 2, 4, 128),
    Stage("mbconv", 9, 1, 6, 160),
    Stage("mbconv", 15, 2, 6, 256),
)
MEDIUM = (
    Stage("conv", 3, 1, 1, 24),
    Stage("fused", 5, 2, 4, 48),
    Stage("fused", 5, 2, 4, 80),
    Stage("mbconv", 7, 2, 4, 160),
    Stage("mbconv", 14, 1, 6, 176),
    Stage("mbconv", 18, 2, 6, 304),
    Stage("mbconv", 5, 1, 6, 512),
)
LARGE = (
    Stage("conv", 4, 1, 1, 32),
    Stage("fused", 7, 2, 4, 64),
    Stage("fused", 7, 2, 4, 96),
    Stage("mbconv", 10, 2, 4, 192),
    Stage("mbconv", 19, 1, 6, 224),
    Stage("mbconv", 25, 2, 6, 384),
    Stage("mbconv", 7, 1, 6, 640),
)


class SqueezeExcite(nnx.Module):
    """Gates each channel by a small network over the channels' means."""

    def __init__(
        self, channels: int, squeeze: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv_reduce = Conv(channels, squeeze, 1, bias=True, dtype=dtype, rngs=rngs)
        self.conv_expand = Conv(squeeze, channels, 1, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jnp.mean(x, (1, 2), keepdims=True)
        gate = self.conv_expand(jax.nn.silu(self.conv_reduce(gate)))
        return x * jax.nn.sigmoid(gate)


class ConvBlock(nnx.Module):
    """A plain 3x3 convolution, with a skip where shapes allow."""

    def __init__(
        self,
        inputs: int,
        stage: Stage,
        *,
        stride: int,
        drop_path: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        outputs = stage.channels
        self.conv = Conv(
            inputs, outputs, 3, stride=stride, padding="same", dtype=dtype, rngs=rngs
        )
        self.bn1 = BatchNorm(outputs, eps=EPS, dtype=dtype)
        self.skip, self.drop_path = stride == 1 and inputs == outputs, drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.bn1(self.conv(x), train, jax.nn.silu)
        return residual(x, y, self.drop_path, train, rngs) if self.skip else y


class FusedMBConv(nnx.Module):
    """3x3 up, 1x1 down, with a skip: on wide maps faster than a depthwise one."""

    def __init__(
        self,
        inputs: int,
        stage: Stage,
        *,
        stride: int,
        drop_path: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        hidden, outputs = inputs * stage.expansion, stage.channels
        self.conv_exp = Conv(
            inputs, hidden, 3, stride=stride, padding="same", dtype=dtype, rngs=rngs
        )
        self.bn1 = BatchNorm(hidden, eps=EPS, dtype=dtype)
        self.conv_pwl = Conv(hidden, outputs, 1, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(outputs, eps=EPS, dtype=dtype)
        self.skip, self.drop_path = stride == 1 and inputs == outputs, drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.bn1(self.conv_exp(x), train, jax.nn.silu)
        y = self.bn2(self.conv_pwl(y), train)
        return residual(x, y, self.drop_path, train, rngs) if self.skip else y


class MBConv(nnx.Module):
    """1x1 up, 3x3 depthwise, squeeze-and-excite to inputs / 4, 1x1 down, skip."""

    def __init__(
        self,
        inputs: int,
        stage: Stage,
        *,
        stride: int,
        drop_path: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        hidden, outputs = inputs * stage.expansion, stage.channels
        self.conv_pw = Conv(inputs, hidden, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(hidden, eps=EPS, dtype=dtype)
        self.conv_dw = DepthwiseConv(
            hidden, 3, stride=stride, padding="same", dtype=dtype, rngs=rngs
        )
        self.bn2 = BatchNorm(hidden, eps=EPS, dtype=dtype)
        self.se = SqueezeExcite(hidden, inputs // 4, dtype=dtype, rngs=rngs)
        self.conv_pwl = Conv(hidden, outputs, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(outputs, eps=EPS, dtype=dtype)
        self.skip, self.drop_path = stride == 1 and inputs == outputs, drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.bn1(self.conv_pw(x), train, jax.nn.silu)
        y = self.bn2(self.conv_dw(y), train, jax.nn.silu)
        y = self.bn3(self.conv_pwl(self.se(y)), train)
        return residual(x, y, self.drop_path, train, rngs) if self.skip else y


KINDS = {"conv": ConvBlock, "fused": FusedMBConv, "mbconv": MBConv}


class EfficientNetV2(nnx.Module):
    """images [batch, H, W, 3] -> map [batch, ceil(H / 32), ceil(W / 32), 1280].

    Args:
      stem: channels of the first convolution.
      drop_path: stochastic depth. The rate of block i of n is drop_path * i / n, as in
        timm, where the usual choice is 0.2.
      remat: compute blocks again in the backward pass instead of keeping them.
    """

    num_features = 1280
    head_hidden = 0  # no layer between pooling and classifier
    head_activation = "relu"
    classifier = "classifier"  # timm's name of a last layer on this backbone

    def __init__(
        self,
        stages: tuple[Stage, ...],
        stem: int,
        *,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv_stem = Conv(
            3, stem, 3, stride=2, padding="same", dtype=dtype, rngs=rngs
        )
        self.bn1 = BatchNorm(stem, eps=EPS, dtype=dtype)
        total, index, inputs, rows = sum(s.repeats for s in stages), 0, stem, []
        for stage in stages:
            row = []
            for i in range(stage.repeats):
                block = KINDS[stage.kind](
                    inputs,
                    stage,
                    stride=stage.stride if i == 0 else 1,
                    drop_path=drop_path * index / total,
                    dtype=dtype,
                    rngs=rngs,
                )
                row.append(block)
                inputs, index = stage.channels, index + 1
            rows.append(Blocks(row, remat))
        self.blocks = Blocks(rows)
        self.conv_head = Conv(inputs, self.num_features, 1, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(self.num_features, eps=EPS, dtype=dtype)

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        x = self.bn1(self.conv_stem(images), train, jax.nn.silu)
        x = self.blocks(x, train, rngs)
        return self.bn2(self.conv_head(x), train, jax.nn.silu)


def tf_efficientnetv2_s(**options) -> EfficientNetV2:
    """timm's `tf_efficientnetv2_s` (and `.in21k`); options as in EfficientNetV2."""
    return EfficientNetV2(SMALL, stem=24, **options)


def tf_efficientnetv2_m(**options) -> EfficientNetV2:
    """timm's `tf_efficientnetv2_m` (and `.in21k`); options as in EfficientNetV2."""
    return EfficientNetV2(MEDIUM, stem=24, **options)


def tf_efficientnetv2_l(**options) -> EfficientNetV2:
    """timm's `tf_efficientnetv2_l` (and `.in21k`); options as in EfficientNetV2."""
    return EfficientNetV2(LARGE, stem=32, **options)
