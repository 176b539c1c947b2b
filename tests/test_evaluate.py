"""What an evaluation says of outputs that are no numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax import evaluate, groups, sharding, speed
from mljax.terminal import nan_note


def scores(outputs, labels) -> evaluate.Scores:
    return evaluate.Scores(outputs, labels, np.arange(len(labels)), np.zeros(0, int))


def test_outputs_that_are_no_numbers_rank_last():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (20, 4)).astype(np.int8)
    outputs = rng.normal(size=(20, 4)).astype(np.float32)
    whole = evaluate.report(scores(outputs, labels), jax.nn.sigmoid)
    assert "nan_images" not in whole
    outputs[[3, 5], [0, 2]] = np.nan
    lowest = np.where(np.isnan(outputs), -50, outputs)
    found = evaluate.report(scores(outputs, labels), jax.nn.sigmoid)
    assert found.pop("nan_images") == 2
    assert found == evaluate.report(scores(lowest, labels), jax.nn.sigmoid)
    # All of them: a bad epoch, which can be written down.
    outputs[:] = np.nan
    found = evaluate.report(scores(outputs, labels), lambda x: jax.nn.sigmoid(23 * x))
    assert found["nan_images"] == 20 and found["OR"] == 0
    assert found["mAP"] < whole["mAP"]
    json.dumps(found, allow_nan=False)
    assert "20 images" in nan_note(20) and "config.optim.lr" in nan_note(20)


@pytest.mark.parametrize("counts", [True, False])
def test_flops_are_counted_for_every_device(counts, monkeypatch):
    """counts: whether the client of the devices does; those for GPUs do not."""
    if not counts:
        monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda _: None)
    mesh, x = sharding.make_mesh(), jnp.ones((16, 8))
    rows = sharding.batch_sharding(mesh)

    def passes(w, stats, x, labels, *keys):
        return jnp.sum(x @ w), w, stats

    def step(w, x):
        key = jax.random.key(0)
        return apart(passes)(w, (), x, x, key, key)

    for wanted in 8, 16:
        apart = groups.over_devices(wanted, mesh, False)
        program = jax.jit(step, in_shardings=(sharding.replicated(mesh), rows))
        flops = speed.mean_flops([program], jnp.ones((8, 512)), x)
        # The product of all rows; adding things up is less.
        assert flops * groups.at_once(wanted, mesh) > 2 * 16 * 8 * 512
        assert flops < 2 * 16 * 8 * 512
    assert groups.at_once(1, mesh) == 1


def test_flops_are_those_of_steps_alike():
    assert list(speed.period(1, 3, thaw_step=0)) == [1, 2, 3]
    assert list(speed.period(1, 3, thaw_step=2)) == [1, 2]
    assert list(speed.period(3, 3, thaw_step=2)) == [3, 4, 5]
