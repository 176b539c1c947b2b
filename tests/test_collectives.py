"""What benchmarks/collectives.py reads off a compiled program."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import config_for

from mljax.models.batch_norm import BatchNorm
from mljax.sharding import make_mesh


@pytest.fixture(scope="module")
def script():
    file = ROOT / "benchmarks" / "collectives.py"
    spec = importlib.util.spec_from_file_location("collectives", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_are_read_with_their_bytes_and_groups(script):
    text = """
  %a = f32[16,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8]
  ROOT %b = (f32[2]{0}, bf16[4]{0}) all-reduce(%y, %z), replica_groups={{0,1},{2,3}}
  %c = f32[64]{0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
  %e = f32[] all-reduce(%v), replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%f
  %f = f32[] all-reduce(%v), replica_groups=mesh['a'=4,'b'=1], device_ids=([4,2]) {'a'}
  %g = f32[] all-reduce(%v), replica_groups=mesh['a'=8] {'a':(1)2}, to_apply=%f
  %h = (f32[9]{0:T(1024)S(1)}, bf16[8,2]{1,0:T(8,128)(2,1)}) all-reduce(%x, %y)
  %i = f32[16,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %d = f32[3]{0} add(%p, %q), metadata={op_name="after all-reduce(x)"}
"""
    assert script.collectives(text, 8) == [
        ("all-reduce", 512, 8),
        ("all-reduce", 16, 2),
        ("all-gather", 256, 4),
        ("all-reduce", 4, 8),
        ("all-reduce", 4, 4),
        ("all-reduce", 4, 2),
        ("all-reduce", 68, 8),
    ]


def test_bytes_of_a_ring(script):
    assert script.sent("all-reduce", 800, 8) == 1400
    assert script.sent("all-gather", 800, 8) == 700
    assert script.sent("reduce-scatter", 100, 8) == 700


def test_a_known_program(script):
    mesh = make_mesh(2, 4)
    weights = jax.ShapeDtypeStruct(
        (64, 8), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    images = jax.ShapeDtypeStruct(
        (16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )

    def loss(w, x):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jnp.sum(jnp.tanh(x @ w))

    text = jax.jit(loss).lower(weights, images).compile().as_text()
    assert sorted(script.collectives(text, 8)) == [
        ("all-gather", 64 * 8 * 4, 4),
        ("all-reduce", 4, 8),
    ]


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_batch_norm_sends_its_sums_alone(script, backend, monkeypatch):
    """Mean and variance on the way forward, two sums on the way back."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    graph, params, stats = nnx.split(BatchNorm(16), nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    rows = NamedSharding(make_mesh(8, 1), P(("data", "fsdp")))
    images = jax.ShapeDtypeStruct((16, 5, 5, 16), jnp.float32, sharding=rows)

    def loss(x):
        y = nnx.merge(graph, params, stats)(x, True, jax.nn.silu)
        return jnp.vdot(y, jnp.sin(x))

    text = jax.jit(jax.grad(loss)).lower(images).compile().as_text()
    sent = script.collectives(text, 8)
    assert {kind for kind, _, _ in sent} == {"all-reduce"}
    assert sum(size for _, size, _ in sent) == 4 * 16 * 4


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_step_sends_little_more_than_it_must(script, fsdp):
    row = script.measure(config_for("mobilenetv3_large_100", "linear"), 8, fsdp)
    assert 0.99 < row["ratio"] < 1.2, row
