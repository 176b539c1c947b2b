"""MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244), as timm builds it.

The map that a backbone returns has 960 channels. The paper's last 1x1 convolution
(960 -> 1280, timm's `conv_head`) comes after pooling and so belongs to the linear and
cosine heads; `head_hidden` and `head_activation` tell them about it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mljax.models.batch_norm import BatchNorm
from mljax.models.blocks import Blocks, residual
from mljax.models.layers import ACTIVATIONS, Conv, DepthwiseConv, Padding


class BlockSpec(NamedTuple):
    """One inverted bottleneck; a list of them for each stage is the architecture."""

    kernel: int
    stride: int
    hidden: int  # channels inside
    outputs: int
    squeeze: int  # channels of the squeeze-and-excite bottleneck; 0 = none
    activation: str


def _stages(kernel: int, squeeze: bool, late: str) -> list[list[BlockSpec]]:
    """Table 1 of the paper: 5x5 kernels, squeeze-and-excite and h-swish as asked."""

    def block(
        kernel: int, stride: int, hidden: int, outputs: int, squeezed: int, act: str
    ) -> BlockSpec:
        return BlockSpec(
            kernel, stride, hidden, outputs, squeezed if squeeze else 0, act
        )

    k = kernel
    return [
        [block(3, 2, 64, 24, 0, "relu"), block(3, 1, 72, 24, 0, "relu")],
        [
            block(k, 2, 72, 40, 24, "relu"),
            block(k, 1, 120, 40, 32, "relu"),
            block(k, 1, 120, 40, 32, "relu"),
        ],
        [
            block(3, 2, 240, 80, 0, late),
            block(3, 1, 200, 80, 0, late),
            block(3, 1, 184, 80, 0, late),
            block(3, 1, 184, 80, 0, late),
        ],
        [block(3, 1, 480, 112, 120, late), block(3, 1, 672, 112, 168, late)],
        [
            block(k, 2, 672, 160, 168, late),
            block(k, 1, 960, 160, 240, late),
            block(k, 1, 960, 160, 240, late),
        ],
    ]


class SqueezeExcite(nnx.Module):
    """Gates each channel by a small network over the channels' means."""

    def __init__(
        self, channels: int, squeeze: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv_reduce = Conv(channels, squeeze, 1, bias=True, dtype=dtype, rngs=rngs)
        self.conv_expand = Conv(squeeze, channels, 1, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jnp.mean(x, (1, 2), keepdims=True)
        gate = self.conv_expand(jax.nn.relu(self.conv_reduce(gate)))
        return x * jax.nn.hard_sigmoid(gate)


class DepthwiseSeparable(nnx.Module):
    """The first block: depthwise, then 1x1 without activation, with a skip."""

    def __init__(
        self,
        channels: int,
        *,
        padding: Padding,
        eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv_dw = DepthwiseConv(
            channels, 3, padding=padding, dtype=dtype, rngs=rngs
        )
        self.bn1 = BatchNorm(channels, eps=eps, dtype=dtype)
        self.conv_pw = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(channels, eps=eps, dtype=dtype)

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.bn1(self.conv_dw(x), train, jax.nn.relu)
        return x + self.bn2(self.conv_pw(y), train)


class InvertedResidual(nnx.Module):
    """1x1 up, depthwise, squeeze-and-excite, 1x1 down; a skip where shapes allow."""

    def __init__(
        self,
        inputs: int,
        spec: BlockSpec,
        *,
        same: bool,
        eps: float,
        drop_path: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        hidden = spec.hidden
        self.conv_pw = Conv(inputs, hidden, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(hidden, eps=eps, dtype=dtype)
        self.conv_dw = DepthwiseConv(
            hidden,
            spec.kernel,
            stride=spec.stride,
            padding="same" if same else spec.kernel // 2,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn2 = BatchNorm(hidden, eps=eps, dtype=dtype)
        self.se = (
            SqueezeExcite(hidden, spec.squeeze, dtype=dtype, rngs=rngs)
            if spec.squeeze
            else None
        )
        self.conv_pwl = Conv(hidden, spec.outputs, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(spec.outputs, eps=eps, dtype=dtype)
        self.activation = ACTIVATIONS[spec.activation]
        self.skip = spec.stride == 1 and inputs == spec.outputs
        self.drop_path = drop_path

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        y = self.bn1(self.conv_pw(x), train, self.activation)
        y = self.bn2(self.conv_dw(y), train, self.activation)
        if self.se is not None:
            y = self.se(y)
        y = self.bn3(self.conv_pwl(y), train)
        return residual(x, y, self.drop_path, train, rngs) if self.skip else y


class ConvBnAct(nnx.Module):
    """The last stage: 1x1 convolution, BatchNorm, activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: str,
        *,
        eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(inputs, outputs, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(outputs, eps=eps, dtype=dtype)
        self.activation = ACTIVATIONS[activation]

    def __call__(
        self, x: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        return self.bn1(self.conv(x), train, self.activation)


class MobileNetV3(nnx.Module):
    """images [batch, H, W, 3] -> map [batch, ceil(H / 32), ceil(W / 32), 960].

    Args:
      same: TensorFlow's padding (timm's `tf_` models) instead of kernel // 2.
      drop_path: stochastic depth. The rate of block i of n is drop_path * i / n.
      remat: compute blocks again in the backward pass instead of keeping them.
    """

    num_features = 960
    head_hidden = 1280
    classifier = "classifier"  # timm's name of a last layer on this backbone

    def __init__(
        self,
        stages: list[list[BlockSpec]],
        activation: str,
        *,
        same: bool,
        eps: float,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        padding: Padding = "same" if same else 1
        self.conv_stem = Conv(
            3, 16, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs
        )
        self.bn1 = BatchNorm(16, eps=eps, dtype=dtype)
        first = DepthwiseSeparable(16, padding=padding, eps=eps, dtype=dtype, rngs=rngs)
        built, inputs = [Blocks([first], remat)], 16
        index, total = 1, 2 + sum(len(specs) for specs in stages)
        for specs in stages:
            blocks = []
            for spec in specs:
                block = InvertedResidual(
                    inputs,
                    spec,
                    same=same,
                    eps=eps,
                    drop_path=drop_path * index / total,
                    dtype=dtype,
                    rngs=rngs,
                )
                blocks.append(block)
                inputs, index = spec.outputs, index + 1
            built.append(Blocks(blocks, remat))
        last = ConvBnAct(
            inputs, self.num_features, activation, eps=eps, dtype=dtype, rngs=rngs
        )
        self.blocks = Blocks([*built, Blocks([last], remat)])
        self.activation = ACTIVATIONS[activation]
        self.head_activation = activation

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        x = self.bn1(self.conv_stem(images), train, self.activation)
        return self.blocks(x, train, rngs)


def mobilenetv3_large_100(**options) -> MobileNetV3:
    """timm's `mobilenetv3_large_100` (and `.miil_in21k`) without its classifier."""
    stages = _stages(kernel=5, squeeze=True, late="hard_swish")
    return MobileNetV3(stages, "hard_swish", same=False, eps=1e-5, **options)


def tf_mobilenetv3_large_minimal_100(**options) -> MobileNetV3:
    """timm's `tf_mobilenetv3_large_minimal_100`: 3x3 kernels, ReLU, no gates."""
    stages = _stages(kernel=3, squeeze=False, late="relu")
    return MobileNetV3(stages, "relu", same=True, eps=1e-3, **options)
