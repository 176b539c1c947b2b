"""The numbers of the report, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from mljax import calibration
from mljax.metrics import classification_report
from mljax.report import numbers


def drawn(images: int = 200, classes: int = 6):
    """Probabilities with ties and labels that follow them, some unknown."""
    rng = np.random.default_rng(0)
    p = np.round(rng.random((images, classes)), 2).astype(np.float32)
    labels = (rng.random(p.shape) < p**2).astype(np.int8)
    labels[rng.random(p.shape) < 0.1] = -1
    return p, labels


def test_curve_is_that_of_scikit_learn():
    p, labels = drawn()
    found = numbers.curve(p[:, 0], labels[:, 0])
    known = labels[:, 0] != -1
    precision, recall, threshold = sk.precision_recall_curve(
        labels[known, 0], p[known, 0]
    )
    np.testing.assert_allclose(found.threshold, threshold[::-1])
    np.testing.assert_allclose(found.precision, precision[:-1][::-1])
    np.testing.assert_allclose(found.recall, recall[:-1][::-1])
    for r in (0.0, 0.31, 1.0):
        best = max(
            x for x, at in zip(precision, recall, strict=True) if at >= r and x < 1.1
        )
        # scikit-learn adds the point (0, 1), which no threshold gives
        if r > 0:
            assert found.at(np.array([r]))[0] == pytest.approx(best)
    assert numbers.curve(p[:, 0], 0 * labels[:, 0]) is None


@pytest.mark.parametrize("points", [40, 1000])
def test_pooled_curve_is_part_of_the_whole_one(points, monkeypatch):
    p, labels = drawn()
    whole = numbers.curve(p, labels)
    assert 40 < len(whole.recall) < 1000
    keep = np.linspace(0, len(whole.recall) - 1, min(points, len(whole.recall)))
    for block in (7, 10_000):  # of entries: several parts, and one
        monkeypatch.setattr(calibration, "_BLOCK", block)
        found = numbers.pooled_curve(p, labels, points)
        for mine, other in zip(found, whole, strict=True):
            np.testing.assert_allclose(mine, other[keep.astype(int)], rtol=1e-15)
        assert numbers.pooled_curve(p, 0 * labels, points) is None
        assert numbers.pooled_curve(p, 0 * labels - 1, points) is None


def test_tables_are_read_in_parts(monkeypatch):
    p, labels = drawn()
    whole = numbers.calibration(p, labels), numbers.most_wrong(p, labels, 50)
    monkeypatch.setattr(calibration, "_BLOCK", 7)
    parts = numbers.calibration(p, labels), numbers.most_wrong(p, labels, 50)
    np.testing.assert_array_equal(parts[1], whole[1])
    for mine, other in zip(parts[0], whole[0], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12)


def test_what_thresholds_give():
    p, labels = drawn()
    above = np.linspace(0.2, 0.9, p.shape[1]).astype(np.float32)
    found = numbers.at_thresholds(p, labels, above)
    for c, threshold in enumerate(above):
        known = labels[:, c] != -1
        y, said = labels[known, c], p[known, c] > threshold
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            y, said, average="binary"
        )
        assert [part[c] for part in found] == pytest.approx([precision, recall, f1])
    everywhere = numbers.at_thresholds(p, labels, 0.5)
    expected = classification_report(p, labels)
    assert everywhere.precision.mean() == pytest.approx(expected["CP"])
    assert everywhere.recall.mean() == pytest.approx(expected["CR"])


def test_calibration_by_hand():
    p = np.array([[0.0, 0.05], [0.5, 1.0], [0.52, 0.9]], np.float32)
    labels = np.array([[0, 1], [1, 1], [0, -1]])
    found = numbers.calibration(p, labels, bins=10)
    np.testing.assert_allclose(found.said, [0.025, 0.51, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found.true, [0.5, 0.5, 1.0])
    np.testing.assert_array_equal(found.entries, [2, 2, 1])
    assert found.error == pytest.approx((2 * 0.475 + 2 * 0.01) / 5)
    p[0, 0] = np.nan  # counts as 0
    assert numbers.calibration(p, labels, bins=10).error == found.error


def test_confusions_and_most_wrong_by_hand():
    labels = np.array([[1, 0, 0], [1, 0, -1], [0, 1, 1], [1, 1, 1]])
    p = np.array([[0.1, 0.9, 0.9], [0.1, 0.8, 0.9], [0.6, 0.2, 0.9], [0.9] * 3])
    expected = [[0, 2, 1], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(numbers.confusions(p, labels), expected)
    losses = numbers.entry_losses(p, labels)
    assert losses[1, 2] == 0 and losses[0, 0] == pytest.approx(-np.log(0.1))
    np.testing.assert_array_equal(numbers.most_wrong(p, labels, 9), [0, 1, 2])
    np.testing.assert_array_equal(numbers.most_wrong(p, labels, 1), [0])
    above = np.array([0.05, 0.95, 0.95])
    expected = [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    np.testing.assert_array_equal(numbers.confusions(p, labels, above), expected)
    np.testing.assert_array_equal(numbers.most_wrong(p, labels, 9, above), [2, 3])
