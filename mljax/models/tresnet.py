"""TResNet (Ridnik et al. 2020, arXiv 2003.13630), with timm's names.

A ResNet made for speed at the same accuracy: space-to-depth instead of a strided
stem, blurred downsampling, squeeze-and-excite in the first three stages, and plain
blocks (M, L) or bottlenecks (v2-L) in the first two. The name "TResNet-L" stands for
two networks: `tresnet_v2_l` is the one of ML-Decoder, `tresnet_l` that of ASL.

The original trains with InPlace-ABN: BatchNorm and leaky ReLU in one, which saves
memory by computing its input again from its output. Here, as in timm, they are two
layers, and `tresnet_abn.py` converts the original's checkpoints.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mljax.errors import UserError
from mljax.models import tresnet_abn
from mljax.models.batch_norm import Activation, BatchNorm
from mljax.models.blocks import Blocks, residual
from mljax.models.layers import Conv, PReLU, constant, relu

EXPANSION = 4  # channels that leave a bottleneck over those inside it
STEM_SLOPE, SLOPE = 1e-2, 1e-3  # leaky ReLU's, below zero


def space_to_depth(images: jax.Array) -> jax.Array:
    """Each 4x4 square becomes one pixel: [b, H, W, 3] -> [b, H / 4, W / 4, 48].

    The channel of pixel (i, j) and colour c is (4 i + j) * 3 + c. Raises UserError if a
    side is not divisible by 4.
    """
    batch, height, width, colours = images.shape
    if height % 4 or width % 4:
        raise UserError(
            f"TResNet needs images whose sides are divisible by 4, not {height} x "
            f"{width}: change config.data.image_size"
        )
    x = images.reshape(batch, height // 4, 4, width // 4, 4, colours)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // 4, width // 4, -1)


def blur_pool(x: jax.Array) -> jax.Array:
    """Every second pixel of x filtered by [1 2 1] / 4 along both axes (Zhang 2019,
    arXiv 1904.11486), borders reflected: [b, H, W, C] -> [b, H / 2, W / 2, C], rounded
    up.

    A filter along rows, then along columns, each as a sum of three slices: on CPU far
    faster than a grouped convolution.
    """
    dtype = x.dtype
    x = x.astype(jnp.promote_types(dtype, jnp.float32))  # sums, rounded once
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    height, width = x.shape[1] - 2, x.shape[2] - 2  # without the borders
    x = (x[:, 0:height:2] + 2 * x[:, 1 : height + 1 : 2] + x[:, 2 : height + 2 : 2]) / 4
    x = (
        x[:, :, 0:width:2] + 2 * x[:, :, 1 : width + 1 : 2] + x[:, :, 2 : width + 2 : 2]
    ) / 4
    return x.astype(dtype)


def halve(x: jax.Array) -> jax.Array:
    """Means of 2x2 squares: [b, H, W, C] -> [b, H / 2, W / 2, C], rounded up.

    At an odd border they are means over what is inside.
    """
    batch, height, width, channels = x.shape
    # A last row or column that is doubled has itself as the mean.
    if height % 2:
        x = jnp.concatenate([x, x[:, -1:]], 1)
    if width % 2:
        x = jnp.concatenate([x, x[:, :, -1:]], 2)
    x = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return jnp.mean(x, (2, 4))


@functools.cache  # one function a slope: BatchNorm's derivative is traced for each
def _leaky_relu(slope: float) -> Activation:
    return lambda x: jax.nn.leaky_relu(x, slope)


class ConvBn(nnx.Module):
    """Convolution, BatchNorm, leaky ReLU (unless `slope` is None), blur (if asked)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        slope: float | None = None,
        *,
        blur: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            inputs, outputs, kernel, padding=kernel // 2, dtype=dtype, rngs=rngs
        )
        self.bn = BatchNorm(outputs, dtype=dtype)
        self.slope, self.blur = slope, blur

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        activation = None if self.slope is None else _leaky_relu(self.slope)
        x = self.bn(self.conv(x), train, activation)
        return blur_pool(x) if self.blur else x

    def start_at_zero(self) -> None:
        """So that a block starts as its skip."""
        self.bn.weight = nnx.Param(constant(0, self.bn.weight.shape, self.bn.dtype))


class SqueezeExcite(nnx.Module):
    """Gates each channel by a small network over the channels' means."""

    def __init__(
        self, channels: int, squeeze: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.fc1 = Conv(channels, squeeze, 1, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Conv(squeeze, channels, 1, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jnp.mean(x, (1, 2), keepdims=True)
        gate = self.fc2(jax.nn.relu(self.fc1(gate)))
        return x * jax.nn.sigmoid(gate)


class Downsample(nnx.Module):
    """The skip where shapes change: mean of 2x2 (if halving), 1x1, BatchNorm.

    The 1x1 is named by its place in torch's Sequential: "1" after a pooling, else "0".
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        halving: bool,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.halving = halving
        conv = ConvBn(inputs, outputs, 1, dtype=dtype, rngs=rngs)
        setattr(self, "1" if halving else "0", conv)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.halving:
            return getattr(self, "1")(halve(x), train)
        return getattr(self, "0")(x, train)


class BasicBlock(nnx.Module):
    """3x3, 3x3, squeeze-and-excite, and the skip: [b, H, W, inputs] -> channels."""

    expansion = 1

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        halving: bool,
        squeeze: bool,
        drop_path: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.downsample = (
            Downsample(inputs, channels, halving, dtype=dtype, rngs=rngs)
            if halving or inputs != channels
            else None
        )
        self.conv1 = ConvBn(
            inputs, channels, 3, SLOPE, blur=halving, dtype=dtype, rngs=rngs
        )
        self.conv2 = ConvBn(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.conv2.start_at_zero()
        self.se = (
            SqueezeExcite(channels, max(channels // 4, 64), dtype=dtype, rngs=rngs)
            if squeeze
            else None
        )
        self.drop_path = drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.conv2(self.conv1(x, train), train)
        if self.se is not None:
            y = self.se(y)
        if self.downsample is not None:
            x = self.downsample(x, train)
        return relu(residual(x, y, self.drop_path, train, rngs))


class Bottleneck(nnx.Module):
    """1x1 down, 3x3, squeeze-and-excite, 1x1 up, and the skip: -> 4 * channels."""

    expansion = EXPANSION

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        halving: bool,
        squeeze: bool,
        drop_path: float,
        prelu: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        outputs = channels * EXPANSION
        self.downsample = (
            Downsample(inputs, outputs, halving, dtype=dtype, rngs=rngs)
            if halving or inputs != outputs
            else None
        )
        self.conv1 = ConvBn(inputs, channels, 1, SLOPE, dtype=dtype, rngs=rngs)
        self.conv2 = ConvBn(
            channels, channels, 3, SLOPE, blur=halving, dtype=dtype, rngs=rngs
        )
        self.se = (
            SqueezeExcite(channels, max(outputs // 8, 64), dtype=dtype, rngs=rngs)
            if squeeze
            else None
        )
        self.conv3 = ConvBn(channels, outputs, 1, dtype=dtype, rngs=rngs)
        self.conv3.start_at_zero()
        self.relu = PReLU(dtype=dtype) if prelu else None
        self.drop_path = drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.conv2(self.conv1(x, train), train)
        if self.se is not None:
            y = self.se(y)
        y = self.conv3(y, train)
        if self.downsample is not None:
            x = self.downsample(x, train)
        x = residual(x, y, self.drop_path, train, rngs)
        return relu(x) if self.relu is None else self.relu(x)


class Body(nnx.Module):
    """Stem and four stages; squeeze-and-excite in all stages but the last."""

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        width: int,
        bottlenecks: bool,
        *,
        prelu: bool,
        drop_path: float,
        remat: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv1 = ConvBn(3 * 16, width, 3, STEM_SLOPE, dtype=dtype, rngs=rngs)
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        inputs = width
        for stage, depth in enumerate(depths):
            kind = Bottleneck if bottlenecks or stage >= 2 else BasicBlock
            options = {"prelu": True} if prelu and stage == 3 else {}
            row = []
            for i in range(depth):
                block = kind(
                    inputs,
                    width * 2**stage,
                    halving=stage > 0 and i == 0,
                    squeeze=stage < 3,
                    drop_path=next(rates),
                    dtype=dtype,
                    rngs=rngs,
                    **options,
                )
                row.append(block)
                inputs = width * 2**stage * kind.expansion
            setattr(self, f"layer{stage + 1}", Blocks(row, remat))

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        x = self.conv1(space_to_depth(images), train)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x, train, rngs)
        return x


class TResNet(nnx.Module):
    """images [b, H, W, 3] -> map [b, ceil(H / 32), ceil(W / 32), 32 * width].

    H and W are divisible by 4 (UserError otherwise).

    Args:
      depths: blocks in each of the four stages.
      width: channels of the stem.
      bottlenecks: in the first two stages as well (v2).
      prelu: the blocks of the last stage end in a PReLU, not in a ReLU: as in the
        paper's implementation with AAM.
      drop_path: stochastic depth. The rate grows from 0 for the first block to this
        one for the last.
      remat: compute blocks again in the backward pass instead of keeping them.
    """

    head_hidden = 0  # no layer between pooling and classifier
    head_activation = "relu"
    classifier = "head.fc"  # timm's name of a last layer on this backbone

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        width: int = 64,
        bottlenecks: bool = False,
        prelu: bool = False,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.body = Body(
            depths,
            width,
            bottlenecks,
            prelu=prelu,
            drop_path=drop_path,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.num_features, self.prelu = width * 8 * EXPANSION, prelu

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        return self.body(images, train, rngs)

    def adapt(self, state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Also takes the original's checkpoints, in torch's layout."""
        if tresnet_abn.is_original(state_dict):
            state_dict = tresnet_abn.from_original(state_dict)
        if self.prelu:
            return state_dict
        return tresnet_abn.without_zero_slopes(state_dict)  # they are those of ReLU


def tresnet_m(**options) -> TResNet:
    """timm's `tresnet_m` without its classifier; options as in TResNet."""
    return TResNet((3, 4, 11, 3), **options)


def tresnet_l(**options) -> TResNet:
    """timm's `tresnet_l` (of ASL) without its classifier; options as in TResNet."""
    return TResNet((4, 5, 18, 3), width=76, **options)


def tresnet_v2_l(**options) -> TResNet:
    """timm's `tresnet_v2_l` (of ML-Decoder) without its classifier; options too."""
    return TResNet((3, 4, 23, 3), bottlenecks=True, **options)
