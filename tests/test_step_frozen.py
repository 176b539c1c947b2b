"""Frozen parameters in the train step: they stay, to the bit, until the thaw."""

from functools import partial

import jax
import numpy as np
import pytest
from small_model import bce, identity, make, make_batch, mlp
from test_step import assert_close, optimizer_for

from configs.common import get_config
from mljax.finetune import frozen_parameters
from mljax.optim import make_optimizer
from mljax.step import create_state, make_train_step


@pytest.mark.parametrize(
    "name, adaptive, accumulate", [("sgd", False, 2), ("lamb", True, 1)]
)
def test_frozen_parameters_stay_and_count_for_nothing(name, adaptive, accumulate):
    """As if they were constants of the model, whatever acts on all the others."""
    optim = {
        "name": name,
        "weight_decay": 0.5,
        "decay_bias_and_norm": True,
        "schedule": "one_cycle",
    }
    options = {
        "reduction": "sum",
        "seed": 0,
        "sam_rho": 0.05,
        "sam_adaptive": adaptive,
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "accumulate": accumulate,
    }
    params, stats = make()

    def constant_fc1(trained, stats, images, **kwargs):
        return mlp({**trained, "fc1": params["fc1"]}, stats, images, **kwargs)

    rest = {k: v for k, v in params.items() if k != "fc1"}
    states = []
    for apply, given, freeze in ((mlp, params, "fc1"), (constant_fc1, rest, "")):
        optimizer = optimizer_for(given, freeze=freeze, **optim)
        state = create_state(given, stats, optimizer, use_ema=True)
        build = partial(make_train_step, apply, bce, optimizer, identity, **options)
        step = jax.jit(build(frozen=frozen_parameters(given, freeze)))
        for i in range(3):
            state, metrics = step(state, make_batch(i))
            assert metrics["finite"]
        states.append(state)
    frozen, expected = states
    for tree in (frozen.params, frozen.ema_params):
        same = partial(jax.tree.map, np.testing.assert_array_equal)
        same(tree["fc1"], params["fc1"])
    without = {k: v for k, v in frozen.params.items() if k != "fc1"}
    averages = {k: v for k, v in frozen.ema_params.items() if k != "fc1"}
    assert_close((without, averages), (expected.params, expected.ema_params))
    assert np.abs(without["fc2"]["weight"] - params["fc2"]["weight"]).max() > 1e-3
    # The optimiser keeps nothing for what it never moves.
    sizes = [sum(x.size for x in jax.tree.leaves(s.opt_state)) for s in states]
    assert sizes[0] == sizes[1]


def test_frozen_parameters_are_trained_from_the_thaw_on():
    params, stats = make()
    optim = {"freeze": "fc1", "name": "adamw", "weight_decay": 0.0}
    config = get_config().optim
    config.update({"lr": 0.05, "schedule": "constant", **optim})
    optimizer = make_optimizer(config, 16, 30, params, thaw_step=2)
    state = create_state(params, stats, optimizer, use_ema=False)
    build = partial(make_train_step, mlp, bce, optimizer, identity)
    options = {"reduction": "sum", "seed": 0}
    before = jax.jit(build(frozen=frozen_parameters(params, "fc1"), **options))
    after = jax.jit(build(**options))
    for i in range(2):
        state, _ = before(state, make_batch(i))
    jax.tree.map(np.testing.assert_array_equal, state.params["fc1"], params["fc1"])
    always, later = state.opt_state
    assert (always[0].count, later[0].count) == (2, 0)
    state, _ = after(state, make_batch(2))
    always, later = state.opt_state
    assert (always[0].count, later[0].count) == (3, 1)
    # Adam's first step is as long as the learning rate: its moments begin here.
    moved = np.abs(state.params["fc1"]["weight"] - params["fc1"]["weight"])
    assert (moved > 0).mean() > 0.5  # the others belong to units that are off
    np.testing.assert_allclose(moved[moved > 0], 0.05, rtol=1e-3)
