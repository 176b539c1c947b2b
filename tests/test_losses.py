"""Losses: properties that must hold for all of them, exact values, configs."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mljax import losses
from mljax.errors import UserError
from mljax.losses import LOSSES, aam, asl, bce, focal, make_loss

# Each loss with its defaults, and with options that make every term of it matter.
VARIANTS = {
    "bce": bce,
    "focal": focal,
    "focal half": lambda x, y, **kw: focal(x, y, gamma=0.5, **kw),
    "asl": asl,
    "asl half": lambda x, y, **kw: asl(x, y, gamma_neg=0.5, gamma_pos=0.5, **kw),
    "asl no eps": lambda x, y, **kw: asl(x, y, gamma_pos=1.0, eps=0.0, **kw),
    "asl no margin": lambda x, y, **kw: asl(x, y, probability_margin=0.0, **kw),
    "aam": aam,
    "aam margin": lambda x, y, **kw: aam(x, y, margin=0.1, **kw),
    "aam focus": lambda x, y, **kw: aam(x, y, gamma_neg=2.0, gamma_pos=1.0, **kw),
    "aam half": lambda x, y, **kw: aam(x, y, gamma_neg=0.5, gamma_pos=0.5, **kw),
    "aam steep": lambda x, y, **kw: aam(
        x, y, scale=60.0, gamma_neg=0.5, gamma_pos=0.1, probability_margin=0.0, **kw
    ),
}
every_loss = pytest.mark.parametrize("loss", VARIANTS.values(), ids=VARIANTS.keys())


def example(seed: int = 0, batch: int = 6, num_classes: int = 5):
    """Outputs in [-1, 1], and labels of every kind."""
    rng = np.random.default_rng(seed)
    outputs = rng.uniform(-1, 1, (batch, num_classes)).astype(np.float32)
    kinds = np.float32([1, 0, -1, 0.3])
    labels = rng.choice(kinds, (batch, num_classes), p=[0.3, 0.4, 0.2, 0.1])
    return outputs, labels


def value_and_grad(loss, outputs, labels, **options):
    return jax.value_and_grad(lambda x: loss(x, labels, **options))(
        jnp.asarray(outputs)
    )


# Properties


@every_loss
def test_unannotated_entries_change_nothing(loss):
    outputs, labels = example()
    ignored = labels == -1
    value, grad = value_and_grad(loss, outputs, labels)
    assert (grad[ignored] == 0).all() and (grad[~ignored] != 0).any()
    for poison in (1000.0, -1000.0, np.inf, np.nan):
        poisoned = np.where(ignored, np.float32(poison), outputs)
        other_value, other_grad = value_and_grad(loss, poisoned, labels)
        assert other_value == value
        np.testing.assert_array_equal(other_grad, grad)


@every_loss
def test_nothing_annotated_is_zero(loss):
    outputs, labels = example()
    for options in ({}, dict(label_smoothing=0.1, reduction="mean")):
        value, grad = value_and_grad(loss, outputs, np.full_like(labels, -1), **options)
        assert value == 0 and (grad == 0).all()


@every_loss
def test_permuting_labels_permutes_the_gradient(loss):
    outputs, labels = example()
    weights = np.float32([1, 2, 3, 0.5, 0])
    order = np.random.default_rng(1).permutation(5)
    value, grad = value_and_grad(loss, outputs, labels, class_weights=weights)
    other_value, other_grad = value_and_grad(
        loss, outputs[:, order], labels[:, order], class_weights=weights[order]
    )
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    np.testing.assert_allclose(other_grad, grad[:, order], rtol=1e-6)


@every_loss
def test_class_weights_and_reduction(loss):
    outputs, labels = example()
    weights = np.float32([1, 2, 3, 0.5, 0])
    alone = [
        loss(outputs[:, c : c + 1], labels[:, c : c + 1], label_smoothing=0.1)
        for c in range(5)
    ]
    got = loss(outputs, labels, label_smoothing=0.1, class_weights=weights)
    np.testing.assert_allclose(got, np.dot(weights, np.stack(alone)), rtol=1e-5)
    total, mean = loss(outputs, labels), loss(outputs, labels, reduction="mean")
    np.testing.assert_allclose(mean, total / len(outputs), rtol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_finite_for_any_input(loss, dtype):
    x = jnp.asarray([-1000, -90, -17, -1, -1e-4, 0, 1e-4, 0.05, 1, 17, 90, 1000], dtype)
    outputs = jnp.tile(x[:, None], (1, 5))
    labels = jnp.tile(jnp.asarray([1, 0, 0.3, 0.999, -1]), (len(x), 1))
    for label_smoothing in (0.0, 0.1):
        value, grad = value_and_grad(
            loss, outputs, labels, label_smoothing=label_smoothing
        )
        assert value.dtype == jnp.float32 and jnp.isfinite(value)
        assert grad.dtype == dtype and jnp.isfinite(grad).all()


@every_loss
def test_nan_is_not_hidden(loss):
    outputs, labels = example()
    labels[0] = 0, 1, 0.3, 0, 1
    for j in range(5):
        poisoned = outputs.copy()
        poisoned[0, j] = np.nan
        assert np.isnan(loss(poisoned, labels))


@every_loss
def test_gradient_matches_finite_differences(loss):
    outputs, labels = example()
    with jax.enable_x64(True):
        outputs = np.float64(outputs)
        _, grad = value_and_grad(loss, outputs, labels)
        step = np.random.default_rng(2).standard_normal(outputs.shape) * 1e-6
        change = loss(outputs + step, labels) - loss(outputs - step, labels)
        np.testing.assert_allclose(change, 2 * np.sum(grad * step), rtol=1e-5)


@every_loss
def test_integer_and_float_labels_agree(loss):
    outputs, labels = example()
    labels = np.where(labels == np.float32(0.3), 1, labels)
    assert loss(outputs, labels.astype(np.int8)) == loss(outputs, labels)


def test_exact_far_from_zero():
    """Where the published form's clamp has stopped: loss |x|, gradient -1 or 1."""
    x = jnp.asarray([[1000.0, -1000.0, 30.0, -30.0]])
    labels = jnp.asarray([[0, 1, 0, 1]])
    unclamped = dict(gamma_neg=0.0, probability_margin=0.0, eps=0.0)
    for value, grad in (
        value_and_grad(bce, x, labels),
        value_and_grad(asl, x, labels, **unclamped),
    ):
        assert value == 2060
        np.testing.assert_array_equal(grad, [[1, -1, 1, -1]])
    value, grad = value_and_grad(asl, x, labels, **(unclamped | dict(eps=1e-8)))
    np.testing.assert_allclose(value, 4 * np.log(1e8), rtol=1e-6)
    assert (grad == 0).all()


def test_focal_is_the_power_form():
    outputs, labels = example()
    labels = np.where(labels == np.float32(0.3), 1, labels)
    p = 1 / (1 + np.exp(-np.float64(outputs)))
    positive = (1 - p) ** 2 * np.log(p)
    negative = p**2 * np.log(1 - p)
    want = -(positive[labels == 1].sum() + negative[labels == 0].sum())
    np.testing.assert_allclose(focal(outputs, labels), want, rtol=1e-6)
    np.testing.assert_allclose(
        focal(outputs, labels, gamma=0), bce(outputs, labels), rtol=1e-6
    )


def test_asl_as_its_authors_train_it():
    outputs, labels = example()

    def weighted(x):
        p, n = jax.nn.sigmoid(x), jnp.minimum(1 - jax.nn.sigmoid(x) + 0.05, 1)
        weight = jnp.where(labels == 1, 1 - p, 1 - n) ** jnp.where(labels == 1, 1, 4)
        log = jnp.log(jnp.where(labels == 1, p, n))
        known = (labels == 0) | (labels == 1)
        return -jnp.sum(known * jax.lax.stop_gradient(weight) * log)

    labels = np.where((labels == 0) | (labels == 1), labels, -1)
    ours = partial(asl, labels=labels, gamma_pos=1.0, weight_gradient=False)
    value, gradient = jax.value_and_grad(ours)(outputs)
    np.testing.assert_allclose(value, weighted(outputs), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(weighted)(outputs), rtol=1e-4)
    flowing = jax.grad(partial(asl, labels=labels, gamma_pos=1.0))(outputs)
    assert not np.allclose(gradient, flowing, rtol=0.1)


def test_losses_share_a_signature():
    for loss in LOSSES.values():
        first, second, *options = inspect.signature(loss).parameters.values()
        assert first.kind == second.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert options[-1].name == "class_weights"
        assert {"reduction", "label_smoothing"} <= {o.name for o in options}


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (bce, dict(reduction="none"), "reduction must be one of sum, mean.*'none'"),
        (bce, dict(label_smoothing=1.0), "label_smoothing"),
        (bce, dict(class_weights=[1.0, 2.0]), r"class_weights .* 5 classes.*\(2,\)"),
        (focal, dict(gamma=-1.0), "gamma must be at least 0 and finite, got -1.0"),
        (asl, dict(gamma_neg=-1.0), "gamma_neg"),
        (asl, dict(gamma_pos=float("nan")), "gamma_pos"),
        (asl, dict(probability_margin=1.5), "probability_margin"),
        (asl, dict(eps=-1e-8), "eps"),
        (asl, dict(scale=0.0), "scale"),
        (aam, dict(scale=-3.0), "scale"),
        (aam, dict(margin=-0.1), "margin"),
        (aam, dict(k=1.2), "k must be between 0 and 1, got 1.2"),
    ],
)
def test_bad_options(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*example(), **options)


def test_bad_shapes():
    outputs, labels = example()
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(6, 1\)"):
        bce(outputs, labels[:, :1])


# Configs


def loss_config(name: str, **changes) -> ConfigDict:
    values = dict(
        name=name,
        reduction="mean",
        label_smoothing=0.1,
        focal=dict(gamma=1.5),
        asl=dict(
            gamma_neg=2.0,
            gamma_pos=1.0,
            probability_margin=0.1,
            eps=0.0,
            weight_gradient=False,
        ),
        aam=dict(
            scale=17.0,
            margin=0.1,
            k=0.6,
            gamma_neg=1.0,
            gamma_pos=0.5,
            probability_margin=0.02,
        ),
    )
    return ConfigDict(values | changes)


@pytest.mark.parametrize("name", LOSSES)
def test_make_loss_passes_every_option(name):
    outputs, labels = example()
    config, weights = loss_config(name), np.float32([1, 2, 3, 4, 5])
    options = config[name].to_dict() if name in config else {}
    want = LOSSES[name](
        outputs,
        labels,
        reduction="mean",
        label_smoothing=0.1,
        class_weights=weights,
        **options,
    )
    loss = make_loss(config, weights)
    assert loss(outputs, labels) == want
    np.testing.assert_allclose(jax.jit(loss)(outputs, labels), want, rtol=1e-6)
    assert make_loss(config.to_dict())(outputs, labels) != want


def test_make_loss_refuses_before_any_work():
    with pytest.raises(UserError, match="one of bce, focal, asl, aam, got 'ce'"):
        make_loss(loss_config("ce"))
    with pytest.raises(UserError, match=r"\(focal\): gamma must be .* got -2.0"):
        make_loss(loss_config("focal", focal=dict(gamma=-2.0)))
    with pytest.raises(UserError, match="reduction"):
        make_loss(loss_config("bce", reduction="avg"))


def test_probabilities():
    outputs, _ = example()
    want = 1 / (1 + np.exp(-17 * outputs))
    got = losses.probabilities(outputs, loss_config("aam"))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    got = losses.probabilities(outputs.astype(jnp.bfloat16), loss_config("asl"))
    assert got.dtype == jnp.float32
    assert [name for name in LOSSES if losses.is_angular(name)] == ["aam"]
    with pytest.raises(ValueError, match="one of bce, focal, asl, aam"):
        losses.is_angular("arcface")
