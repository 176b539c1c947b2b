"""Which images come up in an epoch, and how often."""

import numpy as np

from mljax.data import order

# Label 0 in 90 images, label 1 in 10 of them, label 2 in one; 9 without any, 1 unknown.
LABELS = np.zeros((101, 3), np.int8)
LABELS[:90, 0] = 1
LABELS[:10, 1] = 1
LABELS[90, 2] = 1
LABELS[100] = -1


def test_class_aware_sampling_gives_every_label_its_turn():
    counts = np.zeros(len(LABELS), int)
    for epoch in range(20):
        images = order.class_aware(LABELS, 5, epoch)
        assert images.shape == (101,) and images.dtype == np.int64
        counts += np.bincount(images, minlength=len(LABELS))
    # A quarter of 2020 each: label 0, label 1, label 2, and images without a label.
    assert abs(counts[90] - 505) <= 20
    assert abs(counts[91:].sum() - 505) <= 20
    assert counts[:10].min() > 40  # label 1 brings them up; label 0 a few times too
    assert 0 < counts[10:90].min() and counts[10:90].max() < 12
    assert np.ptp(counts[91:]) <= 20


def test_an_images_turn_comes_again_after_all_others_of_its_label():
    images = order.class_aware(LABELS, 0, 0)
    without = [i for i in images if i > 90]
    for begin in range(0, len(without) - 9, 10):
        assert len(set(without[begin : begin + 10])) == 10


def test_orders_and_numbers_depend_on_seed_and_step():
    for make in (
        lambda seed, step: order.permutation(50, seed, step),
        lambda seed, step: order.class_aware(LABELS, seed, step),
        lambda seed, step: order.draws(seed, step, 4, 3),
    ):
        np.testing.assert_array_equal(make(1, 2), make(1, 2))
        assert (make(1, 2) != make(1, 3)).any() and (make(1, 2) != make(2, 2)).any()
    numbers = order.draws(0, 10**9, 1000, 5)
    assert numbers.dtype == np.float32 and 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
