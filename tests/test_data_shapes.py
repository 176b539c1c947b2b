import numpy as np
import pytest
from data_trees import data_config

from mljax.data import DATASETS, pipeline, shapes
from mljax.errors import UserError
from mljax.metrics import mean_average_precision

SIZE = 64


@pytest.fixture(scope="module")
def sources():
    config = data_config(
        name="shapes", num_train=1000, num_val=500, image_size=SIZE, holdout=0.0
    )
    return DATASETS["shapes"](config, 0), config


def test_labels_and_their_structure(sources):
    source = sources[0].train
    labels = source.labels.astype(bool)
    assert source.class_names == sorted(source.class_names)
    assert len(source.class_names) == 14
    assert set(labels.sum(1)) == {1, 2, 3, 4, 5}
    assert 0.1 < labels.mean(0).min() and labels.mean(0).max() < 0.4
    has = dict(zip(source.class_names, labels.T, strict=True))

    def excludes(a, *others):
        return not any((has[a] & has[b]).any() for b in others)

    assert (has["yellow"] | ~has["star"]).all()
    assert (has["circle"] | has["square"] | ~has["striped"]).all()
    assert excludes("ring", "square")
    assert excludes("crowd", "overlap", "star", "cross", "ring", "crescent", "striped")
    # Triangles are mostly green: 0.7 of them, against 0.1 of circles and squares.
    assert has["green"][has["triangle"]].mean() > 2 * has["green"].mean()


def test_a_picture_depends_on_seed_split_and_index_alone(sources):
    image, labels = shapes.picture(0, "train", 7, SIZE)
    np.testing.assert_array_equal(image, sources[0].train.read(7))
    assert image.dtype == np.uint8 and image.shape == (SIZE, SIZE, 3)
    row = sources[0].train.labels[7]
    assert labels == {shapes.CLASS_NAMES[i] for i in np.flatnonzero(row)}
    for other in ((1, "train", 7), (0, "val", 7), (0, "train", 8)):
        assert (shapes.picture(*other, SIZE)[0] != image).any()


@pytest.mark.parametrize("size", [16, 200])
def test_any_size(size):
    config = data_config(num_train=4, num_val=1, image_size=size, holdout=0.5)
    sources = DATASETS["shapes"](config, -3)
    assert len(sources.train) == len(sources.holdout) == 2
    batches = pipeline.eval_batches(sources.val, data_config=config, batch_size=2)
    assert next(batches)["image"].shape == (2, size, size, 3)


def test_no_pictures():
    with pytest.raises(UserError, match="data.num_train=0"):
        DATASETS["shapes"](data_config(num_train=0, num_val=1, holdout=0.0), 0)


def principal_axes(pixels, new_pixels):
    """Both turned into the principal axes of the first, less its mean.

    For an L2 penalty that changes nothing, and it leaves a column for each picture.
    """
    mean = pixels.mean(0)
    pixels, new_pixels = pixels - mean, new_pixels - mean
    variances, vectors = np.linalg.eigh(pixels @ pixels.T)
    keep = variances > 1e-4 * variances.max()
    scale, vectors = np.sqrt(variances[keep]), vectors[:, keep]
    return vectors * scale, new_pixels @ (pixels.T @ (vectors / scale))


def linear_probe(x, labels, new_x, penalty):
    """Scores of logistic regression."""
    curvature = 0.25 * (x**2).mean(0) + penalty  # the largest, by axis
    weights = step = np.zeros((x.shape[1], labels.shape[1]), np.float32)
    bias = np.zeros(labels.shape[1], np.float32)
    for i in range(60):  # Nesterov's accelerated gradient
        error = 1 / (1 + np.exp(-(x @ step + bias))) - labels
        new = step - (x.T @ error / len(x) + penalty * step) / curvature[:, None]
        step, weights = new + i / (i + 3) * (new - weights), new
        bias = bias - 4 * error.mean(0)
    return new_x @ weights


def test_pixels_alone_do_not_give_the_labels(sources):
    def arrays(name):
        config = sources[1]
        batches = list(
            pipeline.eval_batches(
                getattr(sources[0], name), data_config=config, batch_size=100
            )
        )
        pixels = np.concatenate([b["image"] for b in batches]).astype(np.float32) / 255
        return pixels.reshape(len(pixels), -1), getattr(sources[0], name).labels

    (pixels, labels), (new_pixels, new_labels) = arrays("train"), arrays("val")
    x, new_x = principal_axes(pixels, new_pixels)
    penalties = (1e-3, 1e-2, 1e-1)

    def mean_ap(labels, penalty):
        scores = linear_probe(x, labels, new_x, penalty)
        return mean_average_precision(scores, new_labels)

    prevalence = new_labels.mean()
    assert prevalence + 0.05 < max(mean_ap(labels, p) for p in penalties) < 0.6
    # With the labels of other pictures nothing is left.
    shuffled = np.random.default_rng(0).permutation(labels)
    for penalty in penalties:
        assert abs(mean_ap(shuffled, penalty) - prevalence) < 0.05
