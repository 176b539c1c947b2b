"""Metrics: reference numbers, scikit-learn, and properties."""

import json
import time
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import shared

from mljax import metrics
from mljax.metrics import (
    average_precision,
    classification_report,
    mean_average_precision,
)

KEYS = ["CP", "CR", "CF1", "OP", "OR", "OF1"]
CASES = ["random", "empty_class", "ties", "nothing_predicted", "perfect", "saturated"]


def example(seed: int = 0, num_images: int = 60, num_classes: int = 7):
    """Scores with many ties, labels of which a fifth is not annotated."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-4, 5, (num_images, num_classes)) / 2
    labels = rng.choice(
        np.int8([1, 0, -1]), (num_images, num_classes), p=[0.3, 0.5, 0.2]
    )
    return scores, labels


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Reference numbers


def golden_case(case):
    data = np.load(shared("golden/metrics.npz"))
    if case != "voc_val":
        return data, data[f"{case}/raw_scores"], data[f"{case}/targets"]
    packed = np.unpackbits(data["voc_val/targets_packed"])
    labels = packed[: 4952 * 20].reshape(4952, 20).astype(np.int8)
    noise = np.random.default_rng(2007).standard_normal(labels.shape)
    scores = noise * 1.5 + 3.5 * labels - 2.5
    np.testing.assert_allclose(scores[:3], data["voc_val/raw_first3"], rtol=1e-12)
    return data, scores, labels


@pytest.mark.parametrize("case", [*CASES, "voc_val"])
def test_golden_average_precision(case):
    data, scores, labels = golden_case(case)
    want = data[f"{case}/sk_ap_per_class"]
    np.testing.assert_allclose(average_precision(scores, labels), want, rtol=1e-10)
    got = [
        mean_average_precision(scores, labels),
        mean_average_precision(scores, labels, empty_as_zero=True),
    ]
    np.testing.assert_allclose(got, data[f"{case}/sk_map"], rtol=1e-10)


@pytest.mark.parametrize("case", [*CASES, "voc_val"])
def test_golden_report(case):
    data, scores, labels = golden_case(case)
    probabilities = sigmoid(scores)
    for name, options in {
        "std_thr05": {},
        "std_top3": dict(top_k=3),
        "std_top3_thr05": dict(top_k=3, top_k_and_threshold=True),
    }.items():
        report = classification_report(probabilities, labels, **options)
        assert list(report) == KEYS
        np.testing.assert_allclose(
            list(report.values()), data[f"{case}/{name}"][:6], rtol=1e-10
        )


def test_golden_voc_labels_are_the_annotation_file():
    data, _, labels = golden_case("voc_val")
    path = shared("reference/annotations/VOC/val.json")
    annotations = json.loads(path.read_text())
    classes = sorted(annotations["classes"])
    got = [[c in present for c in classes] for _, present in annotations["images"]]
    np.testing.assert_array_equal(got, labels)
    np.testing.assert_array_equal(labels.sum(0), data["voc_val/class_counts"])


# Average precision


def test_agrees_with_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = example()
    for c, got in enumerate(average_precision(scores, labels)):
        kept = labels[:, c] != -1
        want = sklearn_metrics.average_precision_score(labels[kept, c], scores[kept, c])
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_by_hand():
    # By descending score: hit, miss, hit, and one more hit and a miss that are tied.
    scores = np.array([[0.9], [0.8], [0.7], [0.1], [0.1]])
    labels = np.array([[1], [0], [1], [0], [1]])
    plain = np.mean([1, 2 / 3, 3 / 5])
    np.testing.assert_allclose(average_precision(scores, labels), [plain])
    # The envelope lifts nothing there, but lifts a dip: miss first, then two hits.
    np.testing.assert_allclose(average_precision(scores, labels, envelope=True), plain)
    labels = np.array([[0], [1], [1], [-1], [-1]])
    np.testing.assert_allclose(
        average_precision(scores, labels), [np.mean([1 / 2, 2 / 3])]
    )
    np.testing.assert_allclose(
        average_precision(scores, labels, envelope=True), [2 / 3]
    )


def test_envelope_is_the_area_under_the_monotone_curve():
    scores, labels = example(1)
    got = average_precision(scores, labels, envelope=True)
    assert (got >= average_precision(scores, labels)).all()
    for c in range(labels.shape[1]):
        kept = labels[:, c] != -1
        s, y = scores[kept, c], labels[kept, c]
        area, recall = 0.0, 0.0
        points = [(y[s >= t].sum() / y.sum(), y[s >= t].mean()) for t in np.unique(s)]
        for r, _ in sorted(points):
            area += (r - recall) * max(p for other, p in points if other >= r)
            recall = r
        np.testing.assert_allclose(got[c], area, rtol=1e-12)


@pytest.mark.parametrize("envelope", [False, True])
def test_order_of_images_and_scale_do_not_matter(envelope):
    scores, labels = example()
    want = average_precision(scores, labels, envelope=envelope)
    order = np.random.default_rng(1).permutation(len(scores))
    for other in (scores[order], 3 * scores[order] - 7, np.exp(scores[order])):
        got = average_precision(other, labels[order], envelope=envelope)
        np.testing.assert_array_equal(got, want)


def test_unannotated_entries_change_nothing():
    scores, labels = example()
    for poison in (-1e9, 1e9, np.inf, np.nan, 0.0):
        other = np.where(labels == -1, poison, scores)
        np.testing.assert_array_equal(
            average_precision(other, labels), average_precision(scores, labels)
        )
        for options in ({}, dict(top_k=3), dict(top_k=3, top_k_and_threshold=True)):
            got = classification_report(other, labels, **options)
            assert got == classification_report(scores, labels, **options)


def test_permuting_labels_permutes_the_result(monkeypatch):
    scores, labels = example()
    order = np.random.default_rng(1).permutation(scores.shape[1])
    want = average_precision(scores, labels)
    got = average_precision(scores[:, order], labels[:, order])
    np.testing.assert_array_equal(got, want[order])
    report = classification_report(scores, labels, top_k=3)
    # In small blocks the result is the same.
    monkeypatch.setattr(metrics, "_BLOCK", 100)
    np.testing.assert_array_equal(average_precision(scores, labels), want)
    assert classification_report(scores, labels, top_k=3) == report


def test_empty_classes():
    scores, labels = example()
    labels[:, 2] = np.where(labels[:, 2] == 1, 0, labels[:, 2])
    labels[:, 4] = -1
    per_class = average_precision(scores, labels)
    assert np.isnan(per_class).nonzero()[0].tolist() == [2, 4]
    kept = np.nansum(per_class)
    got = mean_average_precision(scores, labels)
    np.testing.assert_allclose(got, kept / 5)
    got = mean_average_precision(scores, labels, empty_as_zero=True)
    np.testing.assert_allclose(got, kept / 7)
    nothing = np.zeros_like(labels)
    assert np.isnan(mean_average_precision(scores, nothing))
    assert mean_average_precision(scores, nothing, empty_as_zero=True) == 0


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.int32])
def test_dtypes(dtype):
    scores, labels = example()
    scores = 2 * scores  # integers, exact in each of them
    got = average_precision(scores.astype(dtype), labels.astype(np.float32))
    np.testing.assert_array_equal(got, average_precision(scores, labels))


@pytest.mark.parametrize("shift", [-4, 0, 4])
def test_what_is_not_sorted_changes_nothing(shift):
    """Positives below, among and above the rest, with ties and infinities."""
    rng = np.random.default_rng(3)
    labels = rng.choice(np.int8([1, 0, -1]), (300, 5), p=[0.1, 0.7, 0.2])
    scores = np.round(rng.standard_normal((300, 5)), 1) + shift * (labels == 1)
    scores[rng.random(scores.shape) < 0.05] = np.inf
    scores[rng.random(scores.shape) < 0.05] = -np.inf
    for c, got in enumerate(average_precision(scores, labels)):
        s, y = scores[:, c], labels[:, c]
        at_least = [(s >= threshold) & (y != -1) for threshold in s[y == 1]]
        want = np.mean([(y[above] == 1).mean() for above in at_least])
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_memory_is_that_of_a_few_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    scores = rng.random((2000, 1000), np.float32)
    labels = (scores < 0.1).astype(np.int8)
    monkeypatch.setattr(metrics, "_BLOCK", 50_000)
    monkeypatch.setattr(metrics, "_MOST_THREADS", 2)
    tracemalloc.start()
    average_precision(scores, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 20 * 50_000 < scores.nbytes / 3


def test_fast_enough_to_run_after_every_epoch():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5000, 80), np.float32)
    labels = (rng.random((5000, 80)) < 0.04).astype(np.int8)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        average_precision(scores, labels)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # about 0.02 s on an idle core


# Precision, recall, F1


def test_report_by_hand():
    probabilities = np.array([[0.9, 0.6, 0.5], [0.8, 0.4, 0.1]])
    labels = np.array([[1, 0, 1], [1, 1, -1]])
    report = classification_report(probabilities, labels)
    # 0.5 is not above the threshold. Per class: P = 1, 0, 0; R = 1, 0, 0.
    want = dict(CP=1 / 3, CR=1 / 3, CF1=1 / 3, OP=2 / 3, OR=1 / 2, OF1=4 / 7)
    assert report == pytest.approx(want)
    report = classification_report(probabilities, labels, threshold=[0.5, 0.7, 0.3])
    want = dict(CP=2 / 3, CR=2 / 3, CF1=2 / 3, OP=1, OR=3 / 4, OF1=6 / 7)
    assert report == pytest.approx(want)


def test_a_probability_is_not_above_a_threshold_of_the_same_number():
    labels = np.ones((1, 3))
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        p = np.array([[0.1, 0.3, 0.6]], dtype)
        found = [classification_report(p, labels, t)["OR"] for t in (0.1, 0.3, 0.6)]
        assert found == pytest.approx([2 / 3, 1 / 3, 0])
        for number in (np.float64, np.float32, np.asarray):
            found = classification_report(p, labels, number(0.3))["OR"]
            assert found == pytest.approx(1 / 3)


def test_top_k_ties_go_to_the_first_label():
    labels = np.array([[1, 1, 0, 0, 0]])
    tied = np.full((1, 5), 0.3)
    assert classification_report(tied, labels, top_k=2)["OP"] == 1
    assert classification_report(tied, labels[:, ::-1], top_k=2)["OP"] == 0
    tied[0, 4] = 0.9
    assert classification_report(tied, labels, top_k=2)["OP"] == 0.5
    # An entry without annotation takes no place, and k may exceed the classes.
    labels[0, 4] = -1
    assert classification_report(tied, labels, top_k=2)["OP"] == 1
    assert classification_report(tied, labels, top_k=9)["OP"] == 0.5
    # Nor where log(0) is among the scores.
    labels = np.array([[-1, 0, 1, -1, 1]])
    logs = np.array([[-np.inf, -np.inf, -np.inf, -np.inf, -1]])
    assert classification_report(logs, labels, top_k=1)["OR"] == 0.5
    assert classification_report(logs, labels, top_k=2)["OP"] == 0.5
    assert classification_report(logs, labels, top_k=3)["OR"] == 1


def test_report_of_nothing_is_zero():
    report = classification_report(np.zeros((3, 4)), np.full((3, 4), -1), top_k=2)
    assert report == dict.fromkeys(KEYS, 0.0)


# Bad input


@pytest.mark.parametrize(
    "metric", [average_precision, mean_average_precision, classification_report]
)
def test_bad_input(metric):
    scores, labels = example()
    with pytest.raises(ValueError, match=r"\(60, 7\) and \(59, 7\)"):
        metric(scores, labels[1:])
    with pytest.raises(ValueError, match=r"\(60,\)"):
        metric(scores[:, 0], labels[:, 0])
    with pytest.raises(ValueError, match="labels must be 1, 0 or -1, got 2"):
        metric(scores, np.where(labels == 1, 2, labels))
    scores[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 NaN"):
        metric(scores, labels)


def test_bad_report_options():
    with pytest.raises(ValueError, match="top_k must be at least 1 or None, got 0"):
        classification_report(*example(), top_k=0)
    with pytest.raises(ValueError, match="top_k must be a whole number or None, got 2"):
        classification_report(*example(), top_k=2.5)
    with pytest.raises(ValueError, match="one for each of 7 classes"):
        classification_report(*example(), threshold=[0.5, 0.5])
