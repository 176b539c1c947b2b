"""Early stopping: reference decisions, and that its state can be stored."""

import json

import numpy as np
import pytest
from conftest import shared

from mljax.early_stopping import EarlyStopping, better_weights
from mljax.progress import Progress


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


def test_by_hand():
    state = EarlyStopping()
    for metric, warmed_up, expected in (
        # wait, smooth, is_best, stop
        (0.5, False, (0, 0.4, True, False)),
        (0.39, False, (0, 0.4, False, False)),  # does not count yet
        (0.45, True, (0, 0.44, False, False)),
        (0.44, True, (1, 0.44, False, False)),
        (0.5, True, (0, 0.488, True, False)),
        (0.48, True, (1, 0.488, False, False)),
        (0.488, True, (2, 0.488, False, True)),
    ):
        state, *decided = state.update(metric, patience=2, warmed_up=warmed_up)
        found = state.wait, state.smooth, *decided
        assert found == pytest.approx(expected), metric
    assert EarlyStopping().update(0.99993, patience=9).stop  # nothing left to gain
    assert not EarlyStopping().update(0.9998, patience=9).stop


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


def test_nothing_worse_than_perfect_is_best():
    """In a run that goes on without patience."""
    progress = Progress(best={"mAP": 0.99995})
    progress.stopping = EarlyStopping().update(0.97, patience=3).state
    decision = progress.stopping.update(0.99995, patience=3)
    assert decision.stop and decision.is_best
    progress.stopping, progress.stopped = decision.state, True
    progress.go_on(patience=3)
    assert progress.stopped and progress.stopping == decision.state
    progress.go_on(patience=0)
    assert not progress.stopped
    assert not progress.stopping.update(0.975, patience=0).is_best
    assert progress.stopping.update(0.99995, patience=0).is_best
