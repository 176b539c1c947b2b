"""Schedules against PyTorch's tables, parameter groups, the optimisers' rules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import shared

from configs.common import get_config
from mljax import optim

# (name of the table, peak, epochs * iterations, pct_start, final_div_factor)
TABLES = [
    ("60x10", 0.005, 600, 0.2, 1000.0),
    ("10x7", 0.007, 70, 0.3, 100.0),
    ("1x8", 0.1, 8, 0.2, 1000.0),
]


def settings(**changes):
    config = get_config().optim
    config.update(changes)
    return config


def run(config, grads, params, steps=1, total_steps=10):
    """The parameters after `steps` updates with the same gradient."""
    optimizer = optim.make_optimizer(config, 8, total_steps, params)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(grads, state, params, jnp.int32(step))
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name, peak, steps, pct, final", TABLES)
def test_one_cycle_tables(name, peak, steps, pct, final):
    golden = np.load(shared("golden/optim.npz"))
    rates, momenta = golden[f"onecycle_{name}_lr"], golden[f"onecycle_{name}_momentum"]
    rate = optim.one_cycle(peak, steps, pct, final_div_factor=final)
    momentum = optim.one_cycle_momentum(steps, pct)
    # Host values are float64 without being asked to.
    np.testing.assert_allclose([rate(i) for i in range(steps)], rates[:, 0], rtol=1e-12)
    np.testing.assert_allclose(momentum(np.arange(steps)), momenta, rtol=1e-12)
    with jax.enable_x64(True):
        traced = jax.jit(jax.vmap(rate))(jnp.arange(steps))
        np.testing.assert_allclose(traced, rates[:, 0], rtol=1e-12)
        np.testing.assert_allclose(2 * traced, rates[:, 1], rtol=1e-12)
        traced = jax.jit(jax.vmap(momentum))(jnp.arange(steps))
        np.testing.assert_allclose(traced, momenta, rtol=1e-12)
    # float32 stays exact down to the last, five orders of magnitude smaller, rates.
    traced = jax.jit(jax.vmap(rate))(jnp.arange(steps))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, rates[:, 0], rtol=2e-6)


@pytest.mark.parametrize("pct", [0.0, 0.2, 0.5, 1.0])
def test_schedules_are_finite_and_stay_at_their_end(pct):
    steps = np.arange(60)
    for total in (1, 2, 3, 4, 5, 6, 10, 50):
        for schedule in (
            optim.one_cycle(0.1, total, pct),
            optim.one_cycle_momentum(total, pct),
            optim.cosine(0.1, total, pct),
        ):
            for values in (schedule(steps), schedule(jnp.asarray(steps))):
                values = np.asarray(values)
                assert np.isfinite(values).all() and (values > 0).all()
                assert values.max() <= 0.951
                np.testing.assert_array_equal(values[total - 1 :], values[total - 1])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(total_steps=0),
        dict(total_steps=math.nan),
        dict(total_steps=10.5),
        dict(pct_start=math.nan),
        dict(pct_start=1.5),
        dict(div_factor=math.nan),
        dict(final_div_factor=math.nan),
        dict(final_div_factor=-1),
    ],
)
def test_one_cycle_of_impossible_numbers(wrong):
    with pytest.raises(ValueError, match="must be"):
        optim.one_cycle(**{"peak": 0.1, "total_steps": 10, **wrong})


@pytest.mark.parametrize("wrong", [dict(base=math.nan), dict(base=2), dict(maximum=-1)])
def test_one_cycle_of_an_impossible_momentum(wrong):
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        optim.one_cycle_momentum(10, **wrong)


def test_one_cycle_reaches_its_peak_where_it_turns():
    assert optim.one_cycle(1.0, 5, 0.2)(0) == 1.0  # 0 / 0 in PyTorch
    assert optim.one_cycle(1.0, 50, 0.2)(9) == pytest.approx(1.0)
    assert optim.one_cycle(1.0, 50, 1.0)(49) == pytest.approx(1.0)
    assert optim.one_cycle_momentum(50, 0.2)(9) == pytest.approx(0.85)


def test_cosine():
    schedule = optim.cosine(2.0, 100, 0.1)
    np.testing.assert_allclose(schedule(np.arange(10)), 0.2 * np.arange(1, 11))
    assert schedule(10) == pytest.approx(2.0)
    assert schedule(55) == pytest.approx(1.0)
    assert 0 < schedule(99) < 0.001


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="total_steps = 0"):
        optim.one_cycle(0.1, 0)
    with pytest.raises(ValueError, match="pct_start = 1.5"):
        optim.cosine(0.1, 10, 1.5)
    with pytest.raises(ValueError, match="final_div_factor = 0: must be above 0"):
        optim.one_cycle(0.1, 10, final_div_factor=0)
    with pytest.raises(ValueError, match="'adam'.*sgd"):
        optim.make_optimizer(settings(name="adam"), 8, 10, {})
    with pytest.raises(ValueError, match="'step'.*one_cycle"):
        optim.make_optimizer(settings(schedule="step"), 8, 10, {})


def test_parameter_groups():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.ones(4)},
        "bn": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "layers": {"0": {"norm1": {"weight": jnp.ones((2, 2))}}},
        "attention": {"in_proj_bias": jnp.ones((3, 4))},
        "query_embed": {"weight": jnp.ones((5, 4))},
        "pos_embed": jnp.ones((1, 5, 4)),
        "cls_token": jnp.ones((1, 1, 4)),
    }
    is_bias, is_decayed = optim.parameter_groups(params)
    assert is_bias == {
        "conv": {"kernel": False, "bias": True},
        "bn": {"scale": False, "bias": True},
        "layers": {"0": {"norm1": {"weight": False}}},
        "attention": {"in_proj_bias": True},
        "query_embed": {"weight": False},
        "pos_embed": False,
        "cls_token": False,
    }
    decayed = jax.tree.map_with_path(
        lambda path, flag: jax.tree_util.keystr(path) if flag else None, is_decayed
    )
    assert jax.tree.leaves(decayed) == ["['conv']['kernel']"]
    assert all(jax.tree.leaves(optim.parameter_groups(params, True)[1]))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_bias_rate_and_decay(name):
    params = {"w": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}
    config = settings(
        name=name, lr=0.1, weight_decay=0.5, schedule="constant", bias_lr_factor=3.0
    )
    # Without a gradient only what is decayed moves (LAMB: to a unit update, scaled).
    still = run(config, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_array_equal(still["bias"], params["bias"])
    expected = 2 - 0.1 * 0.5 * 2 if name != "lamb" else 2 - 0.1 * 2
    np.testing.assert_allclose(still["w"], expected, rtol=1e-6)
    # Without decay a bias moves three times as far as a weight.
    config.weight_decay = 0.0
    moved = run(config, jax.tree.map(jnp.ones_like, params), params)
    np.testing.assert_allclose(2 - moved["bias"], 3 * (2 - moved["w"][0]), rtol=1e-6)


def test_learning_rate_can_be_given_for_a_reference_batch():
    params = {"w": jnp.ones((2, 2))}
    config = settings(lr=0.1, lr_reference_batch=64, schedule="constant")
    assert optim.make_optimizer(config, 16, 10, params).learning_rate(0) == 0.025
    config.lr_reference_batch = 0
    assert optim.make_optimizer(config, 16, 10, params).learning_rate(0) == 0.1


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_backbone_moves_by_its_factor(name):
    layers = {str(i): {"weight": jnp.full((2, 2), 2.0)} for i in range(2)}
    params = {
        "backbone": {"conv1": {"bias": jnp.full(2, 2.0)}, "blocks": layers},
        "head": {"weight": jnp.full((2, 2), 2.0)},
    }
    config = settings(name=name, lr=0.1, weight_decay=0.5)
    plain = run(config, params, params)
    config.update(backbone_lr_factor=0.5, layer_decay=0.2)
    scaled = run(config, params, params)
    moved = jax.tree.map(lambda a, b, p: (a - p) / (b - p), scaled, plain, params)
    for value, factor in (
        (moved["head"]["weight"], 1.0),
        (moved["backbone"]["blocks"]["1"]["weight"], 0.5 * 0.2),
        (moved["backbone"]["blocks"]["0"]["weight"], 0.5 * 0.2**2),
        (moved["backbone"]["conv1"]["bias"], 0.5 * 0.2**3),
    ):
        np.testing.assert_allclose(value, factor, rtol=1e-2)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_what_is_frozen_has_no_update_and_no_state(name):
    params = {"a": {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": jnp.ones((2, 2))}
    config = settings(name=name, weight_decay=0.5, freeze="a")
    optimizer = optim.make_optimizer(config, 8, 10, params)
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params, jnp.int32(0))
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates["a"])
    assert np.all(np.asarray(updates["b"]) != 0)
    alone = optim.make_optimizer(settings(name=name), 8, 10, {"b": params["b"]})
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert shapes == [x.shape for x in jax.tree.leaves(alone.init({"b": params["b"]}))]


def test_momentum_is_constant_unless_cycled():
    params = {"w": jnp.zeros((1, 1))}
    grads = {"w": jnp.ones((1, 1))}
    config = settings(
        lr=1.0, weight_decay=0.0, momentum=0.5, schedule="constant", nesterov=False
    )
    # Buffers 1, 1.5, 1.75.
    np.testing.assert_allclose(run(config, grads, params, steps=3)["w"], -4.25)
    config.nesterov = True  # steps 1.5, 1.75, 1.875
    np.testing.assert_allclose(run(config, grads, params, steps=3)["w"], -5.125)
    config.update(schedule="one_cycle", cycle_momentum=False, pct_start=0.0)
    config.update(nesterov=False, div_factor=1.0, final_div_factor=1.0)
    np.testing.assert_allclose(
        run(config, grads, params, steps=3)["w"], -4.25, rtol=1e-6
    )


def test_adamw_has_the_settings_of_adamw():
    params = {"w": jnp.full((2, 2), 0.5)}
    config = settings(
        name="adamw", schedule="constant", lr=0.01, b1=0.5, b2=0.7, eps=0.1
    )
    config.update(weight_decay=0.2, momentum=0.3)  # which is of sgd
    optimizer = optim.make_optimizer(config, 8, 10, params)
    known = optax.adamw(0.01, 0.5, 0.7, 0.1, weight_decay=0.2)
    ours, theirs = params, params
    state, other = optimizer.init(params), known.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.cos(9 * x + step), params)
        updates, state = optimizer.update(grads, state, ours, jnp.int32(step))
        ours = optax.apply_updates(ours, updates)
        updates, other = known.update(grads, other, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6)


def test_float32_state_stays_float32_where_float64_is_enabled():
    with jax.enable_x64(True):
        params = {"w": jnp.ones((2, 2), jnp.float32)}
        for name in optim.OPTIMIZERS:
            optimizer = optim.make_optimizer(settings(name=name), 8, 10, params)
            state = optimizer.init(params)
            updates, new = jax.jit(optimizer.update)(params, state, params, 0)
            assert updates["w"].dtype == jnp.float32
            assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
                lambda x: x.dtype, state
            )
