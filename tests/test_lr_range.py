"""The curve of a range test, on losses whose answer is known."""

import math
import shlex

import numpy as np
import pytest

from mljax import find_lr, lr_range
from mljax.errors import UserError


def curve_of(loss, lrs) -> lr_range.Curve:
    curve = lr_range.Curve()
    for lr in lrs.tolist():
        assert not curve.add(lr, float(loss(math.log10(lr))))
    return curve


def test_ramp():
    lrs = lr_range.ramp(1e-4, 1.0, 5)
    np.testing.assert_allclose(lrs, [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    with pytest.raises(ValueError, match="no ramp"):
        lr_range.ramp(1.0, 0.1, 5)


def test_smoothing_is_corrected_and_not_late():
    curve = curve_of(lambda x: 10 - 3 * x, lr_range.ramp(1e-5, 1.0, 60))
    assert curve.smooth_loss[0] == pytest.approx(curve.loss[0])  # not 0.1 of it
    expected = 10 - 3 * np.log10(curve.smooth_lr)
    np.testing.assert_allclose(curve.smooth_loss, expected)
    rows = curve.csv().splitlines()
    assert rows[0] == "lr,loss,smooth_lr,smooth_loss" and len(rows) == 61


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_steepest_point_is_suggested(noise):
    rng = np.random.default_rng(0)

    def loss(x):  # falls around 10^-3, rises around 10^-1
        fall, rise = 1 / (1 + np.exp(-4 * (x + 3))), np.exp(4 * (x + 1))
        return 2 - fall + 0.1 * rise + noise * rng.standard_normal()

    found = lr_range.suggest(curve_of(loss, lr_range.ramp(1e-6, 0.3, 300)))
    assert math.log10(found.steepest) == pytest.approx(-3, abs=0.2)
    assert -2.5 < math.log10(found.lowest) < -1


@pytest.mark.parametrize("count", [0, 5, 200])
def test_nothing_is_suggested_without_a_fall(count, tmp_path):
    rng = np.random.default_rng(1)
    curve = curve_of(lambda _: 1 + 0.1 * rng.standard_normal(), np.full(count, 0.1))
    with pytest.raises(UserError, match=f"in {count} steps the loss did not fall"):
        lr_range.suggest(curve)
    lr_range.draw(tmp_path / "curve.png", curve, None, "flat")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_divergence():
    curve = curve_of(lambda _: 1.0, np.full(30, 0.1))
    assert curve.add(0.1, math.nan) and len(curve.loss) == 30  # left out
    assert not curve.add(0.1, 20.0)
    assert curve.add(0.1, 50.0)  # (0.9^2 x 1 + 0.09 x 20 + 0.1 x 50) > 4


@pytest.mark.parametrize("path", ["runs/lr", "my runs/lr", "it's $HOME"])
def test_what_is_said_of_it_can_be_copied_into_a_shell(capsys, path):
    found = {"method": "trials", "lr": 0.1, "min": 0.01, "max": 1.0, "mAP": 0.5}
    find_lr.tell(found | {"judged_on": "val"}, path)
    said = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(said)[-1] == f"--config.optim.lr_from={path}"
    assert said.endswith(f"={path}") == (path == "runs/lr")
