"""The cheaper forms of SAM: the equations of their papers, and all that they meet."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from small_model import bce, identity, make, make_batch, mlp
from test_preemption import settings, stop_at  # noqa: F401
from test_step import assert_close, optimizer_for

from mljax import config as configs
from mljax import groups, mutual, sharding, speed
from mljax.finetune import frozen_parameters
from mljax.sharding import AXES
from mljax.step import create_state, make_train_step

RHO, ALPHA, LR, MU = 0.1, 0.7, 0.05, 0.9
# SGD in its plainest form: v = mu v + g, w = w - lr v.
PLAIN = {"momentum": MU, "weight_decay": 0.0, "bias_lr_factor": 1.0, "lr": LR}
PERIOD = {"looksam": 3}
FORMS = {
    "looksam": {"sam_rho": RHO},
    "part": {"sam_rho": RHO, "sam_every_images": 4},
    "momentum": {"sam_rho": RHO, "sam_by_momentum": True},
}
mlp_without_norm = partial(mlp, norm=False)


def programs(apply, optimizer, form, loss=bce, **options):
    """The steps of a period, jitted: the first is the full one."""
    options = {"reduction": "sum", "seed": 0, **FORMS[form], **options}
    build = partial(make_train_step, apply, loss, optimizer, identity)
    full = jax.jit(build(**options))
    between = jax.jit(build(**{**options, "sam_rho": 0.0, "sam_reuse": ALPHA}))
    return [full, *[between] * (PERIOD.get(form, 1) - 1)]


@cache
def compiled_once(apply, form, optim, freeze, keys, more):
    """(optimizer, programs) for the parameters `keys` of `make`."""
    params = {key: make()[0][key] for key in keys}
    optimizer = optimizer_for(params, **dict(optim), freeze=freeze)
    frozen = frozen_parameters(params, freeze)
    return optimizer, programs(apply, optimizer, form, frozen=frozen, **dict(more))


def run(form, steps=4, apply=mlp, given=None, optim=PLAIN, freeze="", **more):
    """The state after some steps, and the metrics of the last one."""
    params, stats = given or make()
    keys = tuple(sorted(params)), tuple(sorted(more.items()))
    key = apply, form, tuple(optim.items()), freeze, *keys
    optimizer, every = compiled_once(*key)
    state = create_state(params, stats, optimizer, True, form == "looksam")
    for i in range(steps):
        state, metrics = every[i % len(every)](state, make_batch(i))
    return state, metrics


def restated(apply=mlp_without_norm):
    """(w, unravel, gradient): weights as one vector, float64 in numpy."""
    params, stats = make()
    w, unravel = ravel_pytree(params)

    @jax.jit
    def gradient(w, batch):
        def loss(w):
            outputs, _ = apply(unravel(w), stats, batch["image"], train=True)
            return bce(outputs, batch["labels"])

        return jax.grad(loss)(w)

    def in_numpy(w, batch):
        return np.asarray(gradient(w.astype(np.float32), batch), np.float64)

    return np.asarray(w, np.float64), unravel, in_numpy


def norm(x):
    return np.sqrt(x @ x)


def close_to(state, w, unravel):
    assert_close(state.params, unravel(w.astype(np.float32)), rtol=1e-4, atol=1e-5)


def test_looksam_is_algorithm_1_of_its_paper():
    w, unravel, gradient = restated()
    v = 0.0
    for t in range(7):
        batch = make_batch(t)
        g = gradient(w, batch)
        if t % 3 == 0:
            used = gradient(w + RHO * g / norm(g), batch)
            cos = g @ used / (norm(g) * norm(used))
            kept = used - norm(used) * cos * g / norm(g)
            assert abs(kept @ g) < 1e-6 * norm(kept) * norm(g)
        else:
            used = g + ALPHA * norm(g) / norm(kept) * kept
        v = MU * v + used
        w = w - LR * v
    state, _ = run("looksam", 7, apply=mlp_without_norm)
    close_to(state, w, unravel)
    direction = ravel_pytree(state.sam_direction)[0]
    np.testing.assert_allclose(direction, kept, atol=1e-3 * norm(kept))


def test_momentum_sam_is_algorithm_1_of_its_paper():
    """As it is written there: on weights from which the perturbation is taken off."""
    perturbed, unravel, gradient = restated()
    v = np.zeros_like(perturbed)
    for t in range(7):
        g = gradient(perturbed, make_batch(t))
        w = perturbed + (RHO * v / norm(v) if t else 0)
        v = MU * v + g
        w = w - LR * v
        perturbed = w - RHO * v / norm(v)
    state, _ = run("momentum", 7, apply=mlp_without_norm)
    close_to(state, w, unravel)
    first, _ = run("momentum", 1, apply=mlp_without_norm)
    plain, _ = run("momentum", 1, apply=mlp_without_norm, sam_rho=0.0)
    assert_close(first.params, plain.params, rtol=0, atol=0)


def test_a_part_of_the_batch_perturbs():
    w, unravel, gradient = restated()
    v = 0.0
    for t in range(7):
        batch = make_batch(t)
        g = gradient(w, {name: x[::4] for name, x in batch.items()})
        v = MU * v + gradient(w + RHO * g / norm(g), batch)
        w = w - LR * v
    state, _ = run("part", 7, apply=mlp_without_norm)
    close_to(state, w, unravel)


def test_statistics_of_a_part_move_as_those_of_any_first_pass():
    params, stats = make()
    batch = make_batch(0)
    part, _ = run("part", 1, sam_update_stats="first")
    _, expected = mlp(params, stats, batch["image"][::4], train=True)
    assert_close(part.batch_stats, expected)
    both, _ = run("part", 1)
    change = (
        both.batch_stats["bn"]["running_mean"] - 0.9 * (expected["bn"]["running_mean"])
    )
    assert 0.01 < np.abs(change).max() < 0.2  # a tenth of the mean of all images


def test_full_steps_that_keep_a_direction_are_sam():
    params, stats = make()
    optimizer = optimizer_for(params, **PLAIN)
    step, *_ = programs(mlp, optimizer, "looksam")
    states = [create_state(params, stats, optimizer, True, keep) for keep in (0, 1)]
    for i in range(3):
        states = [step(state, make_batch(i))[0] for state in states]
    alone, keeping = states
    assert alone.sam_direction is None
    assert_close(replace(keeping, sam_direction=None), alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_batch_one_after_the_other(form):
    whole, metrics = run(form, apply=mlp_without_norm)
    # Where the first pass sees a part of the batch it has one part, the second four.
    parts, metrics_parts = run(form, apply=mlp_without_norm, accumulate=4)
    assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    assert_close(metrics_parts, metrics, rtol=1e-3)


def constant_fc1(trained, stats, images, **kwargs):
    return mlp({**trained, "fc1": make()[0]["fc1"]}, stats, images, **kwargs)


@pytest.mark.parametrize(
    ("form", "name"), [("looksam", "sgd"), ("part", "sgd"), ("momentum", "adamw")]
)
def test_frozen_parameters_count_for_nothing(form, name):
    params, stats = make()
    rest = {k: v for k, v in params.items() if k != "fc1"}
    optim = {"name": name, "lr": 0.01}
    frozen, _ = run(form, optim=optim, freeze="fc1")
    expected, _ = run(form, apply=constant_fc1, given=(rest, stats), optim=optim)
    assert_close(frozen.params.pop("fc1"), params["fc1"], rtol=0, atol=0)
    assert_close(frozen.params, expected.params, rtol=1e-4, atol=1e-5)


def test_momentum_after_the_thaw():
    """The optimiser then has two states, for what was frozen and for the rest."""
    from mljax.optim import make_optimizer, momentum_of

    params, _ = make()
    config = configs.common().optim
    config.update(freeze="fc1", schedule="constant", name="sgd", momentum=0.5)
    optimizer = make_optimizer(config, 16, 30, params, thaw_step=1)
    opt_state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    still = jax.tree.map(jnp.zeros_like, params)  # no decay then
    for step, expected in ((0, 0.0), (1, 1.0)):
        _, opt_state = optimizer.update(grads, opt_state, still, step)
        found = momentum_of(opt_state, params)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        np.testing.assert_allclose(found["fc1"]["weight"], expected)
        np.testing.assert_allclose(found["fc2"]["weight"], (1.0, 1.5)[step])


@pytest.mark.parametrize("form", ["looksam", "momentum"])
def test_a_pair_is_two_runs(form):
    made = {n: make(seed) for seed, n in enumerate(mutual.NETWORKS)}
    given = tuple({n: made[n][i] for n in made} for i in (0, 1))
    params, stats = given
    optimizer = optimizer_for(params, **PLAIN)
    loss = mutual.make_loss(bce, weight=0.0, scale=1.0)
    every = programs(mutual.pair(mlp), optimizer, form, loss=loss, is_pair=True)
    both = create_state(params, stats, optimizer, False, form == "looksam")
    for i in range(4):
        both, _ = every[i % len(every)](both, make_batch(i))
    for name in mutual.NETWORKS:
        alone, _ = run(form, given=made[name])
        assert_close(both.params[name], alone.params, rtol=1e-4, atol=1e-5)


def test_groups_keep_the_direction_of_their_sum():
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), AXES)
    params, stats = make()
    w, unravel, gradient = restated()
    rows = sharding.batch_sharding(mesh)
    batch = make_batch(0)
    plain = perturbed = 0.0
    for i in range(2):
        part = {name: x[8 * i : 8 * i + 8] for name, x in batch.items()}
        g = gradient(w, part)
        plain = plain + g
        perturbed = perturbed + gradient(w + RHO * g / norm(g), part)
    u = plain / norm(plain)
    optimizer = optimizer_for(params, **PLAIN)
    by_two = groups.over_devices(2, mesh, is_mean=False)
    step, *_ = programs(mlp_without_norm, optimizer, "looksam", sam_groups=by_two)
    state = create_state(params, stats, optimizer, False, True)
    state, _ = step(state, jax.device_put(batch, rows))
    direction = ravel_pytree(state.sam_direction)[0]
    expected = perturbed - perturbed @ u * u
    np.testing.assert_allclose(direction, expected, atol=1e-4 * norm(expected))
    close_to(state, w - LR * perturbed, unravel)


@pytest.mark.parametrize(
    ("form", "data", "fsdp"), [("looksam", 1, 4), ("part", 4, 1), ("momentum", 2, 2)]
)
def test_on_four_devices(form, data, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(data, fsdp), AXES)
    params, stats = make()
    optimizer = optimizer_for(params, **PLAIN)
    alone, _ = run(form)
    state = create_state(params, stats, optimizer, True, form == "looksam")
    shardings = sharding.state_sharding(state, mesh)
    state = jax.device_put(state, shardings)
    every = programs(mlp, optimizer, form, mesh=sharding.gathered_on(mesh))
    every = [jax.jit(step, out_shardings=(shardings, None)) for step in every]
    for i in range(4):
        batch = jax.device_put(make_batch(i), sharding.batch_sharding(mesh))
        state, _ = every[i % len(every)](state, batch)
    assert_close(jax.device_get(state), jax.device_get(alone), rtol=1e-3, atol=1e-5)
    if form == "looksam":
        kept = state.sam_direction["fc2"]["weight"]
        assert kept.sharding == state.params["fc2"]["weight"].sharding


def test_the_share_of_each_device_is_equal():
    """Every n-th image of a batch that is split over devices: nothing is sent."""
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), AXES)
    rows = sharding.batch_sharding(mesh)
    batch = jax.ShapeDtypeStruct((64, 6), jnp.float32, sharding=rows)
    from mljax.step import _parts

    compiled = jax.jit(lambda x: _parts(x, 4)[:, 0]).lower(batch).compile()
    assert compiled.output_shardings.shard_shape((16, 6)) == (2, 6)
    text = compiled.as_text()
    assert not any(word in text for word in ("all-", "collective-", "reduce-scatter"))


@pytest.mark.parametrize("bad_step", [0, 3, 4])
def test_a_bad_step_leaves_the_direction(bad_step):
    params, stats = make()
    optimizer, every = compiled_once(
        mlp, "looksam", tuple(PLAIN.items()), "", tuple(sorted(params)), ()
    )
    state = create_state(params, stats, optimizer, True, True)
    for i in range(5):
        batch = make_batch(i)
        if i == bad_step:
            batch["image"][3, 2] = np.nan
        before = state
        state, metrics = every[i % 3](state, batch)
        assert metrics["finite"] == (i != bad_step)
        same = jax.tree.map(np.array_equal, before.sam_direction, state.sam_direction)
        # It changes in the full steps that are finite.
        assert all(jax.tree.leaves(same)) == (i % 3 != 0 or i == bad_step)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_each_form_costs_what_its_passes_cost():
    params, stats = make(features=256, hidden=256, classes=64)
    optimizer = optimizer_for(params)
    batch = make_batch(size=256, features=256, classes=64)

    def cost(form, **options):
        every = programs(mlp, optimizer, form, **options)
        keep = form == "looksam"
        state = create_state(params, stats, optimizer, False, keep)
        return speed.mean_flops(every, state, batch)

    one = cost("part", sam_rho=0.0)
    passes = {form: cost(form) / one for form in FORMS}
    passes["full"] = cost("part", sam_every_images=1) / one
    expected = {"full": 2, "looksam": 4 / 3, "part": 5 / 4, "momentum": 1}
    assert passes == pytest.approx(expected, rel=0.03)
