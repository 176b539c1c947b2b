"""Early stopping: reference decisions, and that its state can be stored."""

import json

import numpy as np
import pytest
from conftest import shared

from mljax.early_stopping import EarlyStopping, better_weights


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("case", ["plateau", "noisy", "warm", "perfect", "zero"])
def test_golden(case, warmup):
    data = np.load(shared("golden/engine.npz"))
    metrics = data[f"{case}_w{warmup}/acc"].tolist()
    state = EarlyStopping()
    rows = []
    for epoch, metric in enumerate(metrics):
        state, is_best, stop = state.update(
            metric, patience=5, warmed_up=epoch >= warmup
        )
        rows.append([stop, is_best, state.smooth, state.wait, state.best])
        # A restart between any two evaluations changes nothing.
        state = EarlyStopping.from_dict(json.loads(json.dumps(state.to_dict())))
    np.testing.assert_array_equal(rows, data[f"{case}_w{warmup}/out"])


def test_patience_zero_never_stops():
    state = EarlyStopping()
    for metric in (1.0, 0.5, 0.5, 0.5, 1.0):
        state, is_best, stop = state.update(metric, patience=0)
        assert not stop
        assert is_best == (metric == 1.0)
    assert state.best == 1.0


def test_nan_waits():
    state = EarlyStopping(smooth=0.5, wait=1, best=0.6)
    after, is_best, stop = state.update(float("nan"), patience=2)
    assert after == state._replace(wait=2) and not is_best and stop


def test_negative_patience():
    with pytest.raises(ValueError, match="patience must be at least 0, got -1"):
        EarlyStopping().update(0.5, patience=-1)


def test_better_weights():
    assert better_weights(0.5, 0.6) == (0.6, "ema")
    assert better_weights(0.6, 0.6) == (0.6, "raw")
    assert better_weights(0.6, float("nan")) == (0.6, "raw")
    assert better_weights(0.6) == (0.6, "raw")
