"""The train step: PyTorch trajectories, then the properties of each of its parts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_model import ARRAYS, STATS, bce, identity, make, make_batch, mlp, nest

from configs.common import get_config
from mljax.optim import make_optimizer
from mljax.sharding import batch_sharding, make_mesh
from mljax.step import create_state, half_life_decay, make_eval_step, make_train_step


def optimizer_for(params, **changes):
    config = get_config().optim
    config.update({"lr": 0.05, "schedule": "constant", **changes})
    return make_optimizer(config, 16, 30, params)


def run(steps=3, *, norm=True, loss=bce, optim=None, **options):
    """The state after some steps on random batches, and the metrics of each."""
    params, stats = make()
    optimizer = optimizer_for(params, **(optim or {}))
    use_ema = "ema_decay" in options
    state = create_state(params, stats if norm else {}, optimizer, use_ema)
    apply = partial(mlp, norm=norm)
    options = {"reduction": "sum", "seed": 0, **options}
    step = jax.jit(make_train_step(apply, loss, optimizer, identity, **options))
    metrics = []
    for i in range(steps):
        state, values = step(state, make_batch(i))
        metrics.append(values)
    return state, metrics


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


# Every run of the reference: what differs from its defaults (SGD, one-cycle, groups).
NO_GROUPS = {"bias_lr_factor": 1.0, "decay_bias_and_norm": True}
CONSTANT = {"schedule": "constant"}
# The recorded numbers are those of b2 = 0.999, to the last digit; its description
# says 0.99.
ADAMW = {"name": "adamw", "lr": 0.01, "b2": 0.999}
SAM = {"sam_rho": 0.05}
ASAM = {"sam_rho": 0.05, "sam_adaptive": True}
TRAJECTORIES = {
    "mlp_sam_nbd": ({}, SAM),
    "mlp_sam_adaptive_nbd": ({}, ASAM),
    "mlp_sam_nonbd": (NO_GROUPS, SAM),
    "mlp_sam_nonbd_constlr": (NO_GROUPS | CONSTANT, SAM),
    "mlp_sam_nbd_constlr": (CONSTANT, SAM),
    "mlp_sam_adaptive_constlr": (CONSTANT, ASAM),
    "mlp_sam_nesterov_constlr": (CONSTANT | {"nesterov": True}, SAM),
    "mlp_sgd_nbd": ({}, {}),
    "mlp_sgd_constlr": (NO_GROUPS | CONSTANT, {}),
    "mlp_sgd_clip1_nbd": ({}, {"clip_norm": 1.0}),
    # The reference's clipping does nothing together with SAM.
    "mlp_sam_clip1_nbd": ({}, SAM),
    "mlp_adamw_nbd": (ADAMW, {}),
    "mlp_sam_adamw_nbd": (ADAMW, SAM),
}


def test_every_trajectory_is_listed():
    golden = np.load(shared("golden/optim.npz"))
    names = {k.split("/")[0] for k in golden if k.startswith("mlp_")}
    assert names == set(TRAJECTORIES)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_golden_trajectory(name):
    golden = np.load(shared("golden/optim.npz"))
    optim, options = TRAJECTORIES[name]
    config = get_config().optim
    config.update({"lr": 0.05, **optim})

    def recorded(kind, names, i):
        return nest({n: golden[f"{name}/{kind}/{n}"][i] for n in names})

    with jax.enable_x64(True):
        params, stats = recorded("traj", ARRAYS, 0), recorded("traj", STATS, 0)
        optimizer = make_optimizer(config, 12, 30, params)
        state = create_state(params, stats, optimizer, use_ema=True)
        step = make_train_step(
            mlp,
            bce,
            optimizer,
            identity,
            reduction="sum",
            seed=0,
            ema_decay=0.9993,
            **options,
        )
        step = jax.jit(step, donate_argnums=0)
        for i in range(10):
            batch = {"image": golden["mlp/X"][i], "labels": golden["mlp/Y"][i]}
            state, metrics = step(state, batch)
            close = partial(assert_close, rtol=1e-6, atol=1e-9)
            close(metrics["loss"], golden[f"{name}/loss"][i])
            close(metrics["learning_rate"], golden[f"{name}/lr"][i, 0])
            close(state.params, recorded("traj", ARRAYS, i + 1))
            close(state.batch_stats, recorded("traj", STATS, i + 1))
            close(state.ema_params, recorded("ema", ARRAYS, i))
            close(state.ema_batch_stats, recorded("ema", STATS, i))


def test_sam_with_rho_0_is_no_sam_and_sam_differs():
    plain, _ = run()
    zero, _ = run(sam_rho=0.0, sam_adaptive=True)
    tiny, _ = run(sam_rho=1e-9, sam_update_stats="first")
    sam, _ = run(sam_rho=0.05)
    assert_close(zero, plain, rtol=0, atol=0)
    assert_close(tiny, plain)
    change = sam.params["fc2"]["weight"] - plain.params["fc2"]["weight"]
    assert np.abs(change).max() > 1e-4


def test_batch_statistics_move_in_both_passes_or_in_the_first():
    once, _ = run(1, sam_rho=0.05, sam_update_stats="first")
    plain, _ = run(1)
    both, _ = run(1, sam_rho=0.05)
    assert_close(once.batch_stats, plain.batch_stats)
    ratio = (
        both.batch_stats["bn"]["running_mean"] / once.batch_stats["bn"][STATS[0][3:]]
    )
    np.testing.assert_allclose(ratio, 1.9, atol=0.1)


def test_dropout_is_drawn_anew_in_the_second_pass_and_in_every_step():
    def drawn(params, stats, images, *, train, rng):
        # The outputs are the noise: with a linear loss its gradient tells it.
        noise = jax.random.normal(rng, params["w"].shape)
        return params["w"] * noise, stats

    params = {"w": jnp.ones((3, 2))}
    optimizer = optimizer_for(params)
    batch = {"image": jnp.zeros((2, 1)), "labels": jnp.zeros((2, 1))}
    losses = []
    for rho in (0.0, 1e-9):
        make_step = partial(make_train_step, drawn, lambda out, _: out.sum(), optimizer)
        step = jax.jit(make_step(identity, reduction="sum", seed=3, sam_rho=rho))
        state = create_state(params, {}, optimizer, use_ema=False)
        for i in (0, 1):
            losses.append(
                float(step(replace(state, step=jnp.int32(i)), batch)[1]["loss"])
            )
            again = float(step(replace(state, step=jnp.int32(i)), batch)[1]["loss"])
            assert again == losses[-1]
    assert len(set(losses)) == 4


def test_dropout_is_drawn_anew_in_every_part_of_a_batch():
    def drawn(params, stats, images, *, train, rng):
        return params["w"] * jax.random.normal(rng, params["w"].shape), stats

    params = {"w": jnp.ones((3, 2))}
    optimizer = optimizer_for(params)
    batch = {"image": jnp.zeros((2, 1)), "labels": jnp.zeros((2, 1))}
    losses = []
    for parts in (1, 2):
        step = make_train_step(
            *(drawn, lambda out, _: out.sum(), optimizer, identity),
            **{"reduction": "sum", "seed": 3, "accumulate": parts},
        )
        state = create_state(params, {}, optimizer, use_ema=False)
        losses.append(float(jax.jit(step)(state, batch)[1]["loss"]))
    assert abs(losses[1] - 2 * losses[0]) > 1e-3  # the first part has the same numbers


def test_ema_formula():
    before, _ = run(2, ema_decay=0.9)
    after, _ = run(3, ema_decay=0.9)
    expected = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new,
        (before.ema_params, before.ema_batch_stats),
        (after.params, after.batch_stats),
    )
    assert_close((after.ema_params, after.ema_batch_stats), expected, atol=1e-7)
    assert run(1)[0].ema_params is None
    assert half_life_decay(half_life=640, batch_size=64) ** 10 == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{}, {"sam_rho": 0.05, "clip_norm": 0.1}])
def test_accumulation_equals_the_full_batch(options):
    whole, metrics = run(norm=False, **options)
    parts, metrics_parts = run(norm=False, accumulate=4, **options)
    assert_close(parts.params, whole.params)
    assert_close(metrics_parts, metrics, rtol=1e-4)


def test_accumulation_of_a_mean():
    def mean_bce(outputs, labels):
        return bce(outputs, labels) / outputs.shape[0]

    whole, _ = run(norm=False, loss=mean_bce, reduction="mean")
    parts, _ = run(norm=False, loss=mean_bce, reduction="mean", accumulate=4)
    assert_close(parts.params, whole.params)


def test_accumulation_saves_memory():
    params, _ = make(features=64, hidden=512, classes=64)
    optimizer = optimizer_for(params)
    state = create_state(params, {}, optimizer, False)
    batch = make_batch(size=4096, features=64, classes=64)

    def temporary(accumulate):
        step = make_train_step(
            partial(mlp, norm=False),
            bce,
            optimizer,
            identity,
            reduction="sum",
            seed=0,
            accumulate=accumulate,
        )
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.5 * temporary(1)


def test_clipping_limits_the_gradient_that_is_used():
    momentum_off = {"momentum": 0.0, "weight_decay": 0.0, "bias_lr_factor": 1.0}
    params, _ = make()
    for options in ({}, SAM):
        state, [metrics] = run(1, optim=momentum_off, clip_norm=0.5, **options)
        moved = jax.tree.map(lambda a, b: (a - b) / 0.05, params, state.params)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(moved)))
        assert metrics["grad_norm"] > 0.5
        np.testing.assert_allclose(norm, 0.5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, SAM, {"accumulate": 2}])
def test_a_bad_batch_is_skipped_whole_and_counted(options):
    params, stats = make()
    optimizer = optimizer_for(params, name="adamw", schedule="one_cycle")
    state = create_state(params, stats, optimizer, use_ema=True)
    step = make_train_step(
        mlp, bce, optimizer, identity, reduction="sum", seed=0, ema_decay=0.9, **options
    )
    step = jax.jit(step)
    good = make_batch()
    bad = {**good, "image": good["image"].copy()}
    bad["image"][3, 2] = np.nan

    before, metrics = step(state, good)
    assert metrics["finite"] and metrics["skipped"] == 0
    after, metrics = step(before, bad)
    after, metrics = step(after, bad)
    assert not metrics["finite"]
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (2, 2)
    assert after.step == 3
    counters = {"step": before.step, "skipped": before.skipped}
    same = replace(after, skipped_in_row=before.skipped_in_row, **counters)
    assert_close(same, before, rtol=0, atol=0)

    after, metrics = step(after, good)
    assert metrics["finite"] and np.isfinite(metrics["loss"])
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (2, 0)
    # The schedule goes on with the global step; Adam's own count is of updates.
    assert metrics["learning_rate"] == pytest.approx(optimizer.learning_rate(3))
    assert after.opt_state[0].count == 2


def test_infinite_batch_statistics_make_a_bad_step():
    def overflowing(params, stats, images, *, train, rng):
        return images * params["w"], {"var": stats["var"] + jnp.exp(images.sum())}

    params = {"w": jnp.ones((1, 1))}
    optimizer = optimizer_for(params)
    state = create_state(params, {"var": jnp.ones(())}, optimizer, False)
    step = make_train_step(
        overflowing,
        lambda out, _: out.sum(),
        optimizer,
        identity,
        reduction="sum",
        seed=0,
    )
    batch = {"image": jnp.full((1, 1), 1000.0), "labels": jnp.zeros((1, 1))}
    new, metrics = jax.jit(step)(state, batch)
    assert np.isfinite(metrics["loss"]) and not metrics["finite"]
    assert new.batch_stats["var"] == 1


def test_an_infinite_update_makes_a_bad_step():
    """As that of Adam where a gradient is 0, if its eps is 0 in float32."""
    params, stats = make()
    sound = optimizer_for(params)

    def update(*arguments):
        updates, state = sound.update(*arguments)
        return jax.tree.map(lambda x: x / jnp.zeros(()), updates), state

    optimizer = sound._replace(update=update)
    state = create_state(params, stats, optimizer, use_ema=True)
    step = make_train_step(
        mlp, bce, optimizer, identity, reduction="sum", seed=0, ema_decay=0.9
    )
    new, metrics = jax.jit(step)(state, make_batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert not metrics["finite"] and new.skipped == 1
    for name in ("params", "ema_params", "batch_stats"):
        assert_close(getattr(new, name), getattr(state, name), rtol=0, atol=0)


def test_the_state_can_be_donated():
    params, stats = make()
    optimizer = optimizer_for(params, name="adamw")
    step = make_train_step(
        mlp, bce, optimizer, identity, reduction="sum", seed=0, ema_decay=0.9
    )
    step = jax.jit(step, donate_argnums=0)
    given = jax.tree.map(jnp.asarray, params)
    expected, _ = run(2, ema_decay=0.9, optim={"name": "adamw"})
    for create in (create_state, jax.jit(create_state, static_argnums=(2, 3))):
        state = create(given, stats, optimizer, True)
        state, first = step(state, make_batch(0))
        state, _ = step(state, make_batch(1))
        assert_close(state, expected)
        # Metrics can be read after the state they came with is gone, and the arrays
        # that the state was made from are still there.
        assert jax.device_get(first)["finite"]
        assert_close(given, params, rtol=0, atol=0)


@pytest.mark.parametrize(
    "data, fsdp, options",
    [(8, 1, SAM), (1, 8, {}), (2, 4, {"accumulate": 2})],
)
def test_sharded_equals_one_device(data, fsdp, options):
    mesh = make_mesh(data, fsdp)

    def spec(x):
        whole = x.ndim < 2 or x.shape[0] % fsdp
        return NamedSharding(mesh, P() if whole else P("fsdp"))

    params, stats = make(hidden=16, classes=8)
    optimizer = optimizer_for(params)
    options = {
        "reduction": "sum",
        "seed": 0,
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        **options,
    }
    build = partial(make_train_step, partial(mlp, dropout=0.1), bce, optimizer)
    alone = create_state(params, stats, optimizer, True)
    shardings = jax.tree.map(spec, alone)
    spread = jax.device_put(alone, shardings)
    step_alone = jax.jit(build(identity, **options))
    step_spread = jax.jit(
        build(identity, mesh=mesh, **options), out_shardings=(shardings, None)
    )
    for i in range(2):
        batch = make_batch(i, classes=8)
        alone, metrics = step_alone(alone, batch)
        spread, metrics_spread = step_spread(
            spread, jax.device_put(batch, batch_sharding(mesh))
        )
    assert_close(jax.device_get(spread), jax.device_get(alone))
    assert_close(jax.device_get(metrics_spread), jax.device_get(metrics))
    assert spread.params["fc1"]["weight"].sharding == shardings.params["fc1"]["weight"]


def test_eval_step():
    params, stats = make()

    def half(params, stats, images, *, train, rng=None):
        outputs, stats = mlp(params, stats, images, train=train, rng=rng)
        return outputs.astype(jnp.bfloat16), stats

    images = make_batch()["image"]
    outputs = jax.jit(make_eval_step(half, lambda x: x / 2))(params, stats, images)
    assert outputs.shape == (16, 4) and outputs.dtype == jnp.float32
    expected, _ = mlp(params, stats, images / 2)
    np.testing.assert_allclose(outputs, expected, rtol=0.01, atol=0.01)


def test_bad_arguments_are_named():
    params, _ = make()
    build = partial(make_train_step, mlp, bce, optimizer_for(params), identity, seed=0)
    with pytest.raises(ValueError, match="reduction = 'max'"):
        build(reduction="max")
    with pytest.raises(ValueError, match="sam_update_stats = 'second'"):
        build(reduction="sum", sam_update_stats="second")
    with pytest.raises(ValueError, match="16 images cannot be run in 3 equal parts"):
        run(1, accumulate=3)
