"""Thresholds: the best there are, by brute force, and what few positives do to them."""

import numpy as np
import pytest

from mljax import calibration
from mljax.metrics import classification_report
from mljax.operating_points import choose


@pytest.fixture(params=[7, 500_000], autouse=True)
def of_blocks(request, monkeypatch):
    """Everything in small parts too, whose borders cut classes and equal values."""
    monkeypatch.setattr(calibration, "_BLOCK", request.param)


def some(seed=0, images=60, classes=5, ties=False):
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, classes)) < 0.3).astype(np.int8)
    labels[rng.random(labels.shape) < 0.1] = -1
    p = 1 / (1 + np.exp(-(2 * labels - 1 + rng.normal(0, 1.5, labels.shape))))
    return (np.round(p, 1) if ties else p).astype(np.float32), labels


def counts(p, y, threshold):
    """(right, said, positives) of one class."""
    said = (p > threshold) & (y != -1)
    return (said & (y == 1)).sum(), said.sum(), (y == 1).sum()


def every_threshold(p, y):
    """One for each set of labels that any threshold can give."""
    return [t for t in (0, *np.unique(p)) if counts(p, y, t)[1]]


def f_beta(p, y, threshold, beta=1.0):
    right, said, positives = counts(p, y, threshold)
    return (1 + beta**2) * right / (beta**2 * positives + said)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_f_beta_is_the_highest_there_is(beta, ties):
    for seed in range(5):
        p, y = some(seed, ties=ties)
        found = choose(p, y, beta=beta, shrink=0)
        assert found.thresholds.dtype == np.float32 and found.reached.all()
        for c, threshold in enumerate(found.thresholds):
            best = max(f_beta(p[:, c], y[:, c], t, beta) for t in p[:, c])
            assert f_beta(p[:, c], y[:, c], threshold, beta) == pytest.approx(best)
        flat = p.ravel(), y.ravel()
        best = max(f_beta(*flat, t, beta) for t in every_threshold(*flat))
        assert f_beta(*flat, found.overall, beta) == pytest.approx(best)


@pytest.mark.parametrize("wanted", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_a_wanted_precision_with_the_most_recall(wanted, ties):
    for seed in range(5):
        p, y = some(seed, ties=ties)
        found = choose(p, y, precision=wanted, shrink=0)
        for c, threshold in enumerate(found.thresholds):
            column = p[:, c], y[:, c]
            all_of_them = [counts(*column, t) for t in every_threshold(*column)]
            enough = [r for r, said, _ in all_of_them if r >= wanted * said - 1e-9]
            right, said, _ = counts(*column, threshold)
            assert found.reached[c] == bool(enough)
            if enough:
                assert right == max(enough) and right >= wanted * said - 1e-9
                fewest = min(s for r, s, _ in all_of_them if r == right)
                assert said == fewest  # and of those the one with the most precision
            else:
                assert right / said == max(r / said for r, said, _ in all_of_them)


def test_reached_is_said_of_the_thresholds_that_are_given():
    for seed in range(10):
        p, y = some(seed)
        for name in ("precision", "recall"):
            found = choose(p, y, **{name: 0.8})
            for c, threshold in enumerate(found.thresholds):
                right, said, _ = counts(p[:, c], y[:, c], threshold)
                of = said if name == "precision" else (y[:, c] == 1).sum()
                assert found.reached[c] == (right > 0 and right >= 0.8 * of - 1e-9)


@pytest.mark.parametrize("goal", ["precision", "recall"])
def test_what_is_wanted_is_given_by_every_class_that_can(goal):
    """But for those with less than `shrink` positives, which lean on the others."""
    leaning = 0
    for seed in range(5):
        p, y = some(seed, images=100, classes=8)
        y[:, 6:][y[:, 6:] == 1] = 0
        y[:5, 6:] = 1
        found, alone = (choose(p, y, **{goal: 0.85}, shrink=s) for s in (10, 0))
        enough = (y == 1).sum(0) >= 10
        assert (found.reached >= alone.reached)[enough].all()
        leaning += (found.thresholds != alone.thresholds)[enough].sum()
        assert (found.thresholds != alone.thresholds)[~enough].all()
    assert leaning


@pytest.mark.parametrize("wanted", [0.3, 0.8, 1.0])
def test_a_wanted_recall_with_the_most_precision(wanted):
    for seed in range(5):
        p, y = some(seed)
        found = choose(p, y, recall=wanted, shrink=0)
        assert found.reached.all()
        for c, threshold in enumerate(found.thresholds):
            column = p[:, c], y[:, c]
            precisions = [
                right / said
                for right, said, positives in (
                    counts(*column, t) for t in every_threshold(*column)
                )
                if right >= wanted * positives
            ]
            right, said, positives = counts(*column, threshold)
            assert right >= wanted * positives and right / said == max(precisions)


def test_what_is_not_annotated_counts_nowhere():
    p, y = some()
    more = np.vstack([p, np.random.default_rng(1).random(p.shape, np.float32)])
    unknown = np.vstack([y, np.full_like(y, -1)])
    for options in ({}, {"precision": 0.7}, {"recall": 0.7}):
        one, other = choose(p, y, **options), choose(more, unknown, **options)
        np.testing.assert_allclose(one.thresholds, other.thresholds, rtol=1e-5)


def test_few_positives_lean_on_all_classes():
    p, y = some(images=400)
    y[:, 4][y[:, 4] == 1] = 0
    own, blended, one = (choose(p, y, shrink=s) for s in (0, 10, 1e12))
    np.testing.assert_allclose(one.thresholds, one.overall, rtol=1e-5)
    for found in (own, blended):
        assert found.thresholds[4] == np.float32(found.overall)
        assert np.ptp(found.thresholds) > 0.01


def test_chance_decides_less():
    """Ten positives a class, all classes alike: one threshold would be the best."""
    spread = {0: [], 10: []}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        z = rng.normal(-3, 2, (200, 20))
        y = (rng.random(z.shape) < 1 / (1 + np.exp(-z + 1))).astype(np.int8)
        p = 1 / (1 + np.exp(-z))
        for shrink, found in spread.items():
            t = choose(p, y, shrink=shrink).thresholds
            found.append(np.std(np.log(t / (1 - t))))
    assert np.mean(spread[10]) < 0.3 * np.mean(spread[0])


def test_a_class_with_shifted_scores_has_its_own_threshold():
    """100 positives a class: the best F1 of each on these images, nearly."""
    rng = np.random.default_rng(1)
    y = (rng.random((2000, 6)) < 0.05).astype(np.int8)
    z = -4 + 3.5 * y + 1.5 * rng.standard_normal(y.shape)
    z[:, 5] += 1.5
    p = 1 / (1 + np.exp(-z))

    def f1(threshold):
        said = p[:, 5] > threshold
        return 2 * (said & (y[:, 5] == 1)).sum() / (said.sum() + y[:, 5].sum())

    own, blended = (choose(p, y, shrink=s).thresholds[5] for s in (0, 10))
    assert f1(blended) > f1(own) - 0.05
    assert f1(blended) > f1(0.5) + 0.05


def test_many_positives_are_on_their_own():
    """Classes with thousands of positives, half of them with shifted scores."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (20_000, 4))
    y = (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(np.int8)
    z[:, 2:] += 2
    p = 1 / (1 + np.exp(-z))
    own, blended = (choose(p, y, shrink=s).thresholds for s in (0, 10))
    np.testing.assert_allclose(blended, own, atol=0.05)
    assert blended[2:].min() > blended[:2].max() + 0.2


def test_neighbours_of_float32_are_told_apart():
    high = np.float32(0.7)
    low = np.nextafter(high, np.float32(0))
    p, y = np.array([[high], [low]]), np.array([[1], [0]])
    threshold = choose(p, y, shrink=0).thresholds
    assert (p > threshold).tolist() == [[True], [False]]


def test_probabilities_of_0_and_1():
    p, y = np.array([[1.0], [1.0], [0.0]]), np.array([[1], [0], [1]])
    found = choose(p, y, recall=1.0, shrink=0)
    assert not found.reached[0] and 0 <= found.thresholds[0] < 1
    assert classification_report(p, y, found.thresholds)["OR"] == 0.5
    found = choose(np.zeros((3, 1)), y)
    assert found.thresholds == 0.5


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"beta": 0}, "beta"),
        ({"precision": 1.5}, "precision"),
        ({"recall": 0}, "recall"),
        ({"precision": 0.5, "recall": 0.5}, "only one"),
        ({"shrink": -1}, "shrink"),
        ({"labels": [[0, -1]]}, "no class has a positive"),
        ({"labels": [[2, 0]]}, "labels"),
        ({"probabilities": [[1.5, 0]]}, r"\[0, 1\]"),
        ({"probabilities": [[np.nan, 0]]}, "NaN"),
    ],
)
def test_mistakes(options, word):
    given = {"probabilities": [[0.3, 0.4]], "labels": [[1, 0]]} | options
    arrays = {name: np.array(given.pop(name)) for name in ("probabilities", "labels")}
    with pytest.raises(ValueError, match=word):
        choose(**arrays, **given)
