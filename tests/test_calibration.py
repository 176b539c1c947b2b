"""Calibration: known scales come back, and the error is what it is by hand."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mljax import calibration
from mljax.calibration import (
    METHODS,
    calibration_error,
    class_calibration_error,
    fit,
)


def test_small_parts_change_nothing(monkeypatch):
    z, y = drawn([0.5, 1.0, 2.0], [-1.0, 0.0, 1.0], images=300)
    y[::7] = -1

    def all_of_it():
        for method, per_class in itertools.product(METHODS, (False, True)):
            found = fit(z, y, method=method, per_class=per_class)
            p = found.probabilities(z)
            yield *found, p, calibration_error(p, y), class_calibration_error(p, y)

    whole = list(all_of_it())
    monkeypatch.setattr(calibration, "_BLOCK", 7)
    for found, parts in zip(whole, all_of_it(), strict=True):
        for one, other in zip(found, parts, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_no_images():
    none = np.zeros((0, 3))
    assert (fit(none, none, method="temperature", per_class=True).scale == 1).all()


def drawn(scale, bias, images=20_000, classes=3, seed=0):
    """Logits whose labels come from sigmoid(scale * logit + bias)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 2, (images, classes))
    p = 1 / (1 + np.exp(-(np.asarray(scale) * z + bias)))
    return z.astype(np.float32), (rng.random(z.shape) < p).astype(np.int8)


def test_temperature_comes_back():
    z, y = drawn(0.4, 0)
    found = fit(z, y, method="temperature")
    np.testing.assert_allclose(found.scale, 0.4, atol=0.01)
    assert found.scale.dtype == np.float32 and not found.bias.any()
    p = found.probabilities(z)
    order = np.argsort(z, 0, kind="stable")
    assert (np.diff(np.take_along_axis(p, order, 0), axis=0) >= 0).all()
    before = 1 / (1 + np.exp(-z))
    assert calibration_error(p, y) < 0.01 < 0.05 < calibration_error(before, y)


def test_platt_is_logistic_regression():
    scales, biases = [0.5, 1.0, 2.0], [-1.0, 0.0, 1.0]
    z, y = drawn(scales, biases)
    y[::7] = -1
    found = fit(z, y, method="platt", per_class=True, shrink=0)
    for c in range(3):
        known = y[:, c] != -1
        model = LogisticRegression(C=1e12).fit(z[known, c, None], y[known, c])
        # Platt's targets are not quite 0 and 1.
        assert found.scale[c] == pytest.approx(model.coef_[0, 0], abs=5e-3)
        assert found.bias[c] == pytest.approx(model.intercept_[0], abs=5e-3)
    one = fit(z, y, method="platt")
    assert np.ptp(one.scale) == np.ptp(one.bias) == 0
    assert class_calibration_error(found.probabilities(z), y) < 0.01
    assert class_calibration_error(one.probabilities(z), y) > 0.03


def test_few_positives_lean_on_all_classes():
    z, y = drawn([0.5, 0.5, 2.0], 0)
    y[:, 2][np.flatnonzero(y[:, 2] == 1)[10:]] = -1  # ten are left
    own, one = (fit(z, y, method="platt", per_class=True, shrink=s) for s in (0, 1e12))
    half = fit(z, y, method="platt", per_class=True, shrink=10)
    assert half.scale[2] == pytest.approx((own.scale[2] + one.scale[2]) / 2, rel=1e-4)
    assert half.scale[0] == pytest.approx(own.scale[0], rel=1e-2)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_nothing_runs_away(method):
    z = np.array([[-30.0, 5, 1], [30, -5, 1], [-20, 5, 1], [20, -4, 1]])
    y = np.array([[0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]])
    found = fit(z, y, method=method, per_class=True)
    assert np.isfinite(found.scale).all() and np.isfinite(found.bias).all()
    assert (found.scale > 0).all()
    # The second class is ranked upside down, the third has no negative.
    whole = fit(z, y, method=method)
    np.testing.assert_allclose(found.scale[1:], whole.scale[1:], rtol=1e-6)
    np.testing.assert_allclose(found.bias[1:], whole.bias[1:], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="do not rise"):
        fit(-z, np.where(y == 1, 1, 0)[:, [0, 0, 0]], method=method)


def test_what_is_not_annotated_counts_nowhere():
    z, y = drawn(0.4, 0.3, images=500)
    more = np.vstack([z, 9 * z]), np.vstack([y, np.full_like(y, -1)])
    for per_class in (False, True):
        options = dict(method="platt", per_class=per_class)
        one, other = fit(z, y, **options), fit(*more, **options)
        np.testing.assert_allclose(one.scale, other.scale, rtol=1e-5)
        np.testing.assert_allclose(one.bias, other.bias, rtol=1e-5, atol=1e-6)


def test_calibration_error_by_hand():
    # Bins of a half: 0.2 and 0.4 with one positive, 0.6 and 1.0 with two, one unknown.
    p = np.array([[0.2, 0.4], [0.6, 1.0], [0.9, 0.9]])
    y = np.array([[1, 0], [1, 1], [-1, -1]])
    expected = (2 * abs(0.3 - 0.5) + 2 * abs(0.8 - 1.0)) / 4
    assert calibration_error(p, y, bins=2) == pytest.approx(expected)
    each = [calibration_error(p[:, [c]], y[:, [c]]) for c in (0, 1)]
    assert class_calibration_error(p, y) == pytest.approx(np.mean(each))
    assert calibration_error(p, np.full_like(y, -1)) == 0
    more = np.hstack([p, p[:, :1]]), np.hstack([y, np.full((3, 1), -1)])
    assert class_calibration_error(*more) == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "isotonic"}, "temperature, platt"),
        ({"shrink": -1.0}, "shrink"),
        ({"labels": np.ones((2, 2))}, "one shape"),
    ],
)
def test_mistakes(change, word):
    given = {"logits": np.zeros((2, 1)), "labels": np.ones((2, 1)), "method": "platt"}
    with pytest.raises(ValueError, match=word):
        fit(**(given | change))
