"""The layers that the models are made of; NHWC maps, torch's names and semantics.

Every layer takes `dtype`, the type of its activations: float32, bfloat16 or float64.
Parameters and statistics are kept in float32 at least. Each layer that stores a
weight in another layout than torch says so in `torch_axes`, which `import_torch`
reads.
"""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mljax.models import cpu

Padding = int | str  # pixels on every side, or "same": TensorFlow's SAME

# Looked up when they are called: jax2onnx puts its own in place of them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": lambda x: jax.nn.relu(x),
    "hard_swish": lambda x: jax.nn.hard_swish(x),  # x relu6(x + 3) / 6
}


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), whose derivative looks at the result, which is there anyway.

    `jax.nn.relu` looks at x: a GPU would keep the sum before a block's last ReLU for
    it, and for the next block to take its positive part once more.
    """
    return jax.nn.relu(x)


@relu.defjvp
def _relu_jvp(
    x: tuple[jax.Array], by_x: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = relu(*x)
    if cpu.is_on("gpu"):
        y = lax.optimization_barrier(y)
    return y, jnp.where(y > 0, *by_x, 0)


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32 for float32 and the half types, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def draw(
    rngs: nnx.Rngs,
    distribution: str,
    shape: Iterable[int],
    scale: float,
    dtype: DTypeLike,
) -> jax.Array:
    """Random initial values: N(0, scale^2) for "normal", +-scale for "uniform".

    Drawn with numpy, seeded by the next key of `rngs`, and put in place as they are:
    jax.random and jnp.asarray compile programs for every shape. Under a trace
    (`nnx.eval_shape`, `jax.jit`) there is no key to read and jax.random is used.
    """
    shape, dtype = tuple(shape), at_least_float32(dtype)
    key = rngs.params()
    if isinstance(key, jax.core.Tracer):
        if distribution == "normal":
            return scale * jax.random.normal(key, shape, dtype)
        return jax.random.uniform(key, shape, dtype, -scale, scale)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    if distribution == "normal":
        values = scale * generator.standard_normal(shape)
    else:
        values = generator.uniform(-scale, scale, shape)
    return jax.device_put(values.astype(dtype))


def constant(value: float, shape: int | Iterable[int], dtype: DTypeLike) -> jax.Array:
    """An initial value the same everywhere; by numpy, for the reason in `draw`."""
    return jax.device_put(np.full(shape, value, at_least_float32(dtype)))


def wide_einsum(
    equation: str,
    x: jax.Array,
    y: jax.Array,
    precision: lax.Precision | None = None,
) -> jax.Array:
    """jnp.einsum of two arrays, summed up and returned in float32 at least."""
    wide = at_least_float32(jnp.promote_types(x.dtype, y.dtype))
    if jax.default_backend() == "cpu":  # has no bfloat16 x bfloat16 -> float32
        x, y = x.astype(wide), y.astype(wide)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=wide)


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Zeroes a share `rate` of the entries and scales the others by 1 / (1 - rate).

    The rate is rounded to a multiple of 1 / 65536: 16 random bits decide on an entry,
    and those of an image come in pairs from one draw, at half the cost.
    Raises ValueError for another rate than 0 <= rate < 1, and where it would drop
    something and there is no `rngs`.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout is {rate}: must be at least 0 and below 1")
    if rate == 0:
        return x
    if rngs is None:
        raise ValueError("dropout in training needs rngs=nnx.Rngs(...)")
    dropped = min(round(rate * 65536), 65535)
    axis = min(1, x.ndim - 1)  # not the batch, which may be sharded
    size = x.shape[axis]
    drawn = (*x.shape[:axis], -(-size // 2), *x.shape[axis + 1 :])
    bits = jax.random.bits(rngs.dropout(), drawn, jnp.uint32)
    halves = bits & 65535, bits >> 16
    keep = jnp.concatenate([half >= dropped for half in halves], axis)
    keep = lax.slice_in_dim(keep, 0, size, axis=axis)
    return jnp.where(keep, x / (1 - dropped / 65536), 0)


def pool(x: jax.Array, kind: str) -> jax.Array:
    """One vector an image: [batch, H, W, C] -> [batch, C].

    kind: "avg", "max" or "avg+max" (their sum). Averages are taken in float32 at
    least. Raises ValueError for another kind.
    """
    if kind not in ("avg", "max", "avg+max"):
        raise ValueError(f"pool is {kind!r}; choose avg, max or avg+max")
    if kind == "max":
        return jnp.max(x, (1, 2))
    mean = jnp.mean(x, (1, 2), dtype=at_least_float32(x.dtype)).astype(x.dtype)
    return mean if kind == "avg" else mean + jnp.max(x, (1, 2))


def _pads(
    size: tuple[int, ...], kernel: int, stride: int, padding: Padding
) -> cpu.Pads:
    """Zeros (before, after) the rows and the columns of a map of this size.

    TensorFlow's SAME gives ceil(size / stride) outputs and puts the odd zero after:
    at stride 2 it differs from `kernel // 2` on both sides, and depends on the size.
    """
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)

    def same(n: int) -> tuple[int, int]:
        total = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        return total // 2, total - total // 2

    return same(size[0]), same(size[1])


def _check_padding(padding: Padding) -> Padding:
    if padding != "same" and not isinstance(padding, int):
        raise ValueError(f"padding is {padding!r}; give a number of pixels or 'same'")
    return padding


class Frozen(nnx.BatchStat):
    """A constant that is part of the weights: saved and exported, never trained.

    It travels with the batch statistics, so that neither gradients, nor SAM, nor weight
    decay see it, whatever their settings.
    """


class Stack(nnx.Module):
    """Layers run one after the other; they are named "0", "1", ... as in torch."""

    def __init__(self, layers: Iterable[nnx.Module]):
        self.length = 0
        for layer in layers:
            setattr(self, str(self.length), layer)
            self.length += 1

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.length):
            x = getattr(self, str(i))(x, train=train)
        return x


class Conv(nnx.Module):
    """2-D convolution: [batch, H, W, inputs] -> [batch, H', W', outputs].

    weight [kernel, kernel, inputs, outputs], drawn N(0, 2 / (kernel^2 outputs)) as
    timm does for its efficient networks and for ResNets; bias zero. With `uniform` both
    are drawn as torch.nn.Conv2d does, from -b to b, b = (kernel^2 inputs)^-1/2.
    """

    torch_axes = {"weight": (2, 3, 1, 0)}  # OIHW -> HWIO

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding = 0,
        bias: bool = False,
        uniform: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (kernel, kernel, inputs, outputs)
        bound = (kernel * kernel * inputs) ** -0.5
        std = math.sqrt(2 / (kernel * kernel * outputs))
        self.weight = nnx.Param(
            draw(rngs, "uniform", shape, bound, dtype)
            if uniform
            else draw(rngs, "normal", shape, std, dtype)
        )
        if not bias:
            self.bias = None
        elif uniform:
            self.bias = nnx.Param(draw(rngs, "uniform", (outputs,), bound, dtype))
        else:
            self.bias = nnx.Param(constant(0, outputs, dtype))
        self.kernel, self.stride = kernel, stride
        self.padding, self.dtype = _check_padding(padding), dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, weight = x.astype(self.dtype), self.weight[...].astype(self.dtype)
        unpadded = self.padding in (0, "same")
        if self.kernel == 1 and unpadded and not cpu.is_plain():
            # Twice as fast as lax.conv on CPU.
            x = x[:, :: self.stride, :: self.stride]
            # As two matrices: the gradient of a product of more dimensions goes
            # through a transposed copy of the whole map.
            flat = cpu.product(x.reshape(-1, x.shape[-1]), weight[0, 0])
            x = flat.reshape(*x.shape[:-1], -1)
        else:
            pads = _pads(x.shape[1:3], self.kernel, self.stride, self.padding)
            plain = functools.partial(cpu.convolve, stride=self.stride, pads=pads)
            if x.shape[-1] <= 4 and self.kernel > 1:
                few: Callable[..., jax.Array]
                few = functools.partial(cpu.stem_conv, stride=self.stride, pads=pads)
                apart = self.kernel == self.stride and not np.any(pads)
                if apart and not any(side % self.kernel for side in x.shape[1:3]):
                    few = cpu.patch_conv
                x = cpu.choose(few, plain, x, weight)
            else:
                x = cpu.dense_conv(x, weight, self.stride, pads)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """A filter of its own for each channel: [batch, H, W, C] -> [batch, H', W', C].

    weight [kernel, kernel, 1, C], drawn N(0, 2 / kernel^2) as in timm. On the CPU
    backend it runs as shifted slices (`cpu.depthwise_conv`).
    """

    torch_axes = {"weight": (2, 3, 1, 0)}  # [C, 1, k, k] -> [k, k, 1, C]

    def __init__(
        self,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (kernel, kernel, 1, channels)
        std = math.sqrt(2 / (kernel * kernel))
        self.weight = nnx.Param(draw(rngs, "normal", shape, std, dtype))
        self.kernel, self.stride = kernel, stride
        self.padding, self.dtype = _check_padding(padding), dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, weight = x.astype(self.dtype), self.weight[...].astype(self.dtype)
        pads = _pads(x.shape[1:3], self.kernel, self.stride, self.padding)
        stride = self.stride
        return cpu.choose(
            lambda x, weight: cpu.depthwise_conv(x, weight, stride, pads),
            functools.partial(
                cpu.convolve, stride=stride, pads=pads, groups=x.shape[-1]
            ),
            x,
            weight,
        )


class Linear(nnx.Module):
    """x [..., inputs] @ weight [inputs, outputs] + bias.

    Weight and bias uniform +-1/sqrt(inputs), as torch's nn.Linear.
    """

    torch_axes = {"weight": (1, 0)}

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(inputs)
        self.weight = nnx.Param(draw(rngs, "uniform", (inputs, outputs), bound, dtype))
        self.bias = nnx.Param(draw(rngs, "uniform", (outputs,), bound, dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, weight = x.astype(self.dtype), self.weight[...].astype(self.dtype)
        return cpu.product(x, weight) + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, as torch's LayerNorm, in float32 at least."""

    def __init__(
        self, features: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32
    ):
        self.weight = nnx.Param(constant(1, features, dtype))
        self.bias = nnx.Param(constant(0, features, dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(at_least_float32(x.dtype))
        centred = exact - jnp.mean(exact, -1, keepdims=True)
        var = jnp.mean(jnp.square(centred), -1, keepdims=True)
        scale = self.weight[...] * lax.rsqrt(var + self.eps)
        return (centred * scale + self.bias[...]).astype(self.dtype)


class PReLU(nnx.Module):
    """max(x, 0) + weight min(x, 0) with one learned weight, 0.25 at first."""

    def __init__(self, *, dtype: DTypeLike = jnp.float32):
        self.weight = nnx.Param(constant(0.25, 1, dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, x, self.weight[...].astype(x.dtype) * x)
