"""Multiply-adds and parameters against published figures and timm's."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from flax import nnx
from golden_backbones import reference
from jax import lax

from mljax.models import cpu
from mljax.models.layers import DepthwiseConv


@pytest.fixture(scope="module")
def script():
    file = ROOT / "benchmarks" / "model_costs.py"
    spec = importlib.util.spec_from_file_location("model_costs", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(script, function, *shapes) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return script.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_what_is_counted(script):
    def convolve(groups):
        return lambda x, w: lax.conv_general_dilated(
            x,
            w,
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    image = (2, 8, 8, 6)
    full = counted(script, convolve(1), image, (3, 3, 6, 10))
    assert full == 2 * 4 * 4 * 10 * (3 * 3 * 6)
    assert counted(script, convolve(6), image, (3, 3, 1, 6)) == 2 * 4 * 4 * 6 * 9

    def twice(x, y):  # a product of batches, inside a jit
        return jax.nn.relu(jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(x, y))

    assert counted(script, twice, (3, 4, 5), (3, 5, 7)) == 3 * 4 * 5 * 7
    assert counted(script, lambda x: jnp.tanh(x) * x, (8, 8)) == 0


def test_plain_forms_are_the_same_function():
    layer = DepthwiseConv(4, 3, stride=2, padding="same", rngs=nnx.Rngs(0))
    image = jax.random.normal(jax.random.key(0), (2, 9, 9, 4))

    def traced():
        return jax.jit(lambda x: layer(x)).trace(image)

    def is_plain(form) -> bool:
        names = {equation.primitive.name for equation in form.jaxpr.jaxpr.eqns}
        return names == {"conv_general_dilated"}

    shifted = traced()
    with cpu.plain_forms():
        plain = traced()
    assert is_plain(plain) and not is_plain(shifted) and not is_plain(traced())
    values = [form.lower().compile()(image) for form in (plain, shifted)]
    assert jnp.allclose(*values, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "published"),  # arXiv 2209.06585, ML-Decoder, 448 x 448, 80 labels
    [
        ("tf_efficientnetv2_s", 12.28e9),
        ("tf_efficientnetv2_l", 49.92e9),
        ("tresnet_v2_l", 36.15e9),
    ],
)
def test_multiply_adds_are_within_two_percent_of_the_published(
    script, backbone, published
):
    found = script.multiply_adds(backbone, "ml_decoder")
    assert found == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("file", "timm", "ours"),
    [
        ("timm0613", "mobilenetv3_large_100", "mobilenetv3_large_100"),
        ("timm0613", "tf_efficientnetv2_s", "tf_efficientnetv2_s"),
        ("timm0613", "tv_resnet101", "resnet101"),
        ("timm1019", "tresnet_l", "tresnet_l"),
        ("timm1019", "tresnet_v2_l", "tresnet_v2_l"),
    ],
)
def test_parameters_are_timms(script, file, timm, ours):
    expected = reference(file, timm)["n_params"]  # with a classifier of 20 labels
    assert script.parameters(ours, "linear", 20) == expected


def test_the_gate_of_a_graph_costs_nothing_at_inference(script):
    plain = script.multiply_adds("resnet50", "linear", 20, 64)
    assert script.multiply_adds("resnet50", "gcn", 20, 64) == plain
    # Two layers 300 -> 2048 -> 2048; the cosine classifier has no bias.
    gate = script.parameters("resnet50", "gcn", 20)
    gate -= script.parameters("resnet50", "linear", 20)
    assert gate == 300 * 2048 + 2048 * 2048 - 20
