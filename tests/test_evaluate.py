"""What an evaluation says of outputs that are no numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax import evaluate, sharding, speed
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
def test_flops_are_counted_of_all_devices(counts, monkeypatch):
    """counts: whether the client of the devices does; those for GPUs do not."""
    if not counts:
        monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda _: None)
    mesh, x = sharding.make_mesh(), jnp.ones((16, 8))
    places = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    program = jax.jit(jnp.matmul, in_shardings=places[::-1])
    flops = speed.mean_flops([program], x, jnp.ones((8, 512)))
    assert flops == 2 * 16 * 8 * 512


def test_blocks_of_probabilities(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (20, 4)).astype(np.int8)
    outputs = rng.normal(size=(20, 4)).astype(np.float32)
    whole = evaluate.report(scores(outputs, labels), jax.nn.sigmoid)
    monkeypatch.setattr(evaluate, "_BLOCK", 13)
    assert evaluate.report(scores(outputs, labels), jax.nn.sigmoid) == whole


def test_flops_are_those_of_steps_alike():
    assert list(speed.period(1, 3, thaw_step=0)) == [1, 2, 3]
    assert list(speed.period(1, 3, thaw_step=2)) == [1, 2]
    assert list(speed.period(3, 3, thaw_step=2)) == [3, 4, 5]
