"""A computation on each part of a batch: on any devices what it is by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mljax import groups
from mljax.errors import UserError
from mljax.sharding import AXES, batch_sharding


def passes(params, stats, images, labels, first, second):
    """SAM in small: the gradient where the own one leads."""

    def loss(w):
        return jnp.sum((images @ w - labels) ** 2)

    own = jax.grad(loss)(params)
    value, gradient = jax.value_and_grad(loss)(params + 0.1 * own)
    return (
        value,
        gradient + 0.1 * sum(jax.random.normal(key, (3,)) for key in (first, second)),
        {"moves": stats["moves"] + images.mean(), "stays": stats["stays"]},
    )


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("is_mean", [True, False])
def test_parts_of_a_batch(shape, is_mean):
    count = shape[0] * shape[1]
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), AXES)
    draw = np.random.default_rng(0)
    images = draw.normal(size=(16, 3)).astype(np.float32)
    labels = draw.normal(size=16).astype(np.float32)
    w, keys = jnp.ones(3), jax.random.split(jax.random.key(0))
    rows = batch_sharding(mesh)
    batch = jax.device_put((images, labels), (rows, rows))
    each = jax.jit(groups.over_devices(4, mesh, is_mean)(passes))
    stays = jnp.asarray(draw.normal(size=99), jnp.float32)
    before = {"moves": jnp.zeros(()), "stays": stays}
    loss, gradient, stats = each(w, before, *batch, *keys)
    parts = [slice(4 * i, 4 * i + 4) for i in range(4)]
    alone = [
        passes(
            w, before, images[p], labels[p], *(jax.random.fold_in(k, i) for k in keys)
        )
        for i, p in enumerate(parts)  # each has numbers of its own
    ]
    total = [sum(np.asarray(part[i]) for part in alone) for i in range(2)]
    moved = np.mean([part[2]["moves"] for part in alone])
    by = 4 if is_mean else 1
    np.testing.assert_allclose(loss, total[0] / by, rtol=1e-5)
    np.testing.assert_allclose(gradient, total[1] / by, rtol=1e-5)
    np.testing.assert_allclose(stats["moves"], moved, atol=1e-6)
    np.testing.assert_array_equal(stats["stays"], stays)
    whole = passes(w, before, images, labels, *keys)
    assert not np.allclose(gradient, np.asarray(whole[1]) / by, rtol=1e-2)


def test_parts_must_not_be_cut():
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), AXES)
    with pytest.raises(UserError, match="mesh.data=4 --config.mesh.fsdp=-1"):
        groups.over_devices(4, mesh, False)
