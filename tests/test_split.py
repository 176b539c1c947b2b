import numpy as np
import pytest

from mljax.data.split import holdout


def many_labels(num_images=2000, num_classes=30):
    rng = np.random.default_rng(0)
    return (rng.random((num_images, num_classes)) < np.logspace(-2.5, -0.3, 30)).astype(
        np.int8
    )


def test_every_label_gets_its_share():
    labels = many_labels()
    kept, held = holdout(labels, range(len(labels)), 0.2, seed=0)
    np.testing.assert_array_equal(np.sort(np.r_[kept, held]), np.arange(len(labels)))
    assert abs(len(held) - 400) <= 10
    counts, expected = labels[held].sum(0), 0.2 * labels.sum(0)
    assert np.abs(counts - expected).max() <= 2
    # A random choice is far less even.
    by_chance = labels[np.random.default_rng(0).permutation(2000)[:400]].sum(0)
    assert np.abs(by_chance - expected).max() > 5


def test_the_seed_decides():
    labels = many_labels()
    first, again, other = (holdout(labels, range(2000), 0.1, s)[1] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)


def test_duplicates_stay_together():
    labels = many_labels(600)
    content = np.random.default_rng(1).integers(0, 250, 600)
    kept, held = holdout(labels, list(content), 0.25, seed=0)
    assert not set(content[kept]) & set(content[held])
    assert abs(len(held) - 150) <= 15


def test_unknown_labels_are_not_positive():
    labels = np.full((100, 2), -1, np.int8)
    labels[:10, 0] = 1
    _, held = holdout(labels, range(100), 0.5, seed=0)
    assert len(held) == 50 and (labels[held, 0] == 1).sum() == 5


def test_images_without_labels_and_extremes():
    labels = np.zeros((10, 3), np.int8)
    assert [len(i) for i in holdout(labels, range(10), 0.3, seed=0)] == [7, 3]
    assert [len(i) for i in holdout(labels, range(10), 0.0, seed=0)] == [10, 0]
    with pytest.raises(ValueError, match="fraction=1.5"):
        holdout(labels, range(10), 1.5, seed=0)
