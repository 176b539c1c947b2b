"""ResNet-50 and -101 (He et al. 2015, arXiv 1512.03385), with timm's names.

The stride of a stage is in the 3x3 convolution of its first block ("v1.5"), as in
torchvision and timm, and not in the 1x1 before it as in the paper.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models import cpu
from mljax.models.batch_norm import BatchNorm
from mljax.models.blocks import Blocks, residual
from mljax.models.layers import Conv, constant, relu

EXPANSION = 4  # channels that leave a block over those inside it


class Downsample(nnx.Module):
    """The skip where shapes change: a strided 1x1 convolution and BatchNorm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = Conv(inputs, outputs, 1, stride=stride, dtype=dtype, rngs=rngs)
        setattr(self, "0", conv)
        setattr(self, "1", BatchNorm(outputs, dtype=dtype))

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return getattr(self, "1")(getattr(self, "0")(x), train)


class Bottleneck(nnx.Module):
    """1x1 down, 3x3, 1x1 up to four times as many channels, and the skip.

    The last BatchNorm's weight starts at zero, so that the block starts as its skip.
    drop_path: stochastic depth's rate of the branch beside the skip.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        stride: int,
        drop_path: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        outputs = channels * EXPANSION
        self.conv1 = Conv(inputs, channels, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(channels, dtype=dtype)
        self.conv2 = Conv(
            channels, channels, 3, stride=stride, padding=1, dtype=dtype, rngs=rngs
        )
        self.bn2 = BatchNorm(channels, dtype=dtype)
        self.conv3 = Conv(channels, outputs, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(outputs, dtype=dtype)
        self.bn3.weight = nnx.Param(constant(0, outputs, dtype))
        self.downsample = (
            Downsample(inputs, outputs, stride, dtype=dtype, rngs=rngs)
            if stride > 1 or inputs != outputs
            else None
        )
        self.drop_path = drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.bn1(self.conv1(x), train, jax.nn.relu)
        y = self.bn2(self.conv2(y), train, jax.nn.relu)
        y = self.bn3(self.conv3(y), train)
        if self.downsample is not None:
            x = self.downsample(x, train)
        return relu(residual(x, y, self.drop_path, train, rngs))


class ResNet(nnx.Module):
    """images [batch, H, W, 3] -> map [batch, ceil(H / 32), ceil(W / 32), 2048].

    Args:
      depths: blocks in each of the four stages.
      drop_path: stochastic depth. The rate grows from 0 for the first block to this
        one for the last.
      remat: compute blocks again in the backward pass instead of keeping them.
      width: channels of the first stage, inside its blocks.
    """

    head_hidden = 0  # no layer between pooling and classifier
    head_activation = "relu"
    classifier = "fc"  # timm's name of a last layer on this backbone

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        width: int = 64,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv1 = Conv(3, width, 7, stride=2, padding=3, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, dtype=dtype)
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        inputs = width
        for stage, depth in enumerate(depths):
            row = []
            for i in range(depth):
                block = Bottleneck(
                    inputs,
                    width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    drop_path=next(rates),
                    dtype=dtype,
                    rngs=rngs,
                )
                row.append(block)
                inputs = width * 2**stage * EXPANSION
            setattr(self, f"layer{stage + 1}", Blocks(row, remat))
        self.num_features = inputs

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        x = max_pool(self.bn1(self.conv1(images), train, jax.nn.relu))
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x, train, rngs)
        return x


def max_pool(x: jax.Array) -> jax.Array:
    """Largest of 3x3 at every second pixel: [b, H, W, C] -> half of it, rounded up."""
    if cpu.is_on("cpu"):
        return cpu.max_pool(x, 3, 2, ((1, 1), (1, 1)))
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    if cpu.is_plain():
        # ONNX: of the other form jax2onnx makes a pool over four axes, which ONNX
        # Runtime refuses, and of this one it leaves out the padding.
        x = jnp.pad(x, pads, constant_values=-jnp.inf)
        return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


def resnet50(**options) -> ResNet:
    """timm's `resnet50` without its classifier `fc`; options as in ResNet."""
    return ResNet((3, 4, 6, 3), **options)


def resnet101(**options) -> ResNet:
    """timm's `resnet101` without its classifier `fc`; options as in ResNet."""
    return ResNet((3, 4, 23, 3), **options)
