"""The mesh, the fsdp rule, and placing host arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mljax import sharding
from mljax.errors import UserError


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [(-1, 1, (8, 1)), (4, -1, (4, 2)), (2, 4, (2, 4)), (1, -1, (1, 8))],
)
def test_mesh_fills_in(data, fsdp, shape):
    mesh = sharding.make_mesh(data, fsdp)
    assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, -1), (-1, -1), (2, 2), (0, 8)])
def test_impossible_mesh(data, fsdp):
    with pytest.raises(UserError, match=r"config\.mesh.*8 devices"):
        sharding.make_mesh(data, fsdp)


def test_fsdp_rule():
    mesh = sharding.make_mesh(2, 4)
    tree = {
        "large": np.zeros((3, 3, 256, 512), np.float32),
        "odd": np.zeros((5, 5, 301, 7), np.float32),
        "bias": np.zeros((512,), np.float32),
        "scalar": np.zeros((), np.int32),
    }
    specs = {k: s.spec for k, s in sharding.state_sharding(tree, mesh).items()}
    assert specs["large"] == P(None, None, None, "fsdp")
    assert specs["odd"] == specs["bias"] == specs["scalar"] == P()
    whole = sharding.state_sharding(tree, sharding.make_mesh(8, 1))
    assert all(s.spec == P() for s in whole.values())


def test_place_keeps_values_and_makes_fresh_buffers():
    mesh = sharding.make_mesh(2, 4)
    host = {"a": np.arange(2**16, dtype=np.float32).reshape(256, 256)}
    shardings = sharding.state_sharding(host, mesh)
    first, second = (sharding.place(host, shardings) for _ in range(2))
    np.testing.assert_array_equal(first["a"], host["a"])
    double = jax.jit(lambda a, b: (a["a"] * 2, b["a"]), donate_argnums=0)
    np.testing.assert_array_equal(double(first, second)[0], host["a"] * 2)
    assert host["a"][0, 1] == 1


def test_global_batch_is_split_over_all_devices():
    mesh = sharding.make_mesh(4, 2)
    rows = np.arange(16, dtype=np.int32)
    batch = sharding.global_batch({"x": rows}, sharding.batch_sharding(mesh))
    assert len(batch["x"].addressable_shards) == 8
    assert batch["x"].addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(sharding.to_host(batch["x"]), rows)


def test_fetch_gives_what_device_get_does():
    whole = sharding.replicated(sharding.make_mesh())
    values = jax.device_put(
        {"loss": jnp.float32(1.5), "finite": jnp.bool_(True), "step": jnp.arange(3)},
        whole,
    )
    found, expected = sharding.fetch(values), jax.device_get(values)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert type(value) is np.ndarray and value.dtype == expected[name].dtype
        np.testing.assert_array_equal(value, expected[name])
