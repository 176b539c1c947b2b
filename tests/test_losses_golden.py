"""Losses: the reference's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from test_losses import value_and_grad

from mljax.losses import LOSSES, aam, asl, bce


def golden():
    return np.load(shared("golden/losses.npz"))


def golden_targets(data, kinds):
    effective = {"mixup": data["y_mixup_effective"]}
    return jnp.stack([jnp.asarray(effective.get(k, data.get(f"y_{k}"))) for k in kinds])


def check_golden(data, prefix, kinds, row, values, grads):
    for value, grad, kind in zip(values, grads, kinds, strict=True):
        np.testing.assert_allclose(
            value, data[f"{prefix}_{kind}_loss"][row], rtol=1e-10, err_msg=kind
        )
        np.testing.assert_allclose(
            grad,
            data[f"{prefix}_{kind}_grad"][row],
            rtol=1e-9,
            atol=1e-12,
            err_msg=kind,
        )


def test_golden_aam():
    data = dict(golden())
    kinds = ["hard", "ignore", "soft", "mixup"]
    names = ["scale", "margin", "k", "gamma_neg", "gamma_pos", "probability_margin"]
    with jax.enable_x64(True):
        cosines, targets = jnp.asarray(data["cos"]), golden_targets(data, kinds)
        for row, settings in enumerate(data["aam_params"].tolist()):
            options = dict(zip([*names, "label_smoothing"], settings, strict=True))
            grad = jax.value_and_grad(lambda x, t, o=options: aam(x, t, **o))
            values, grads = jax.vmap(grad, (None, 0))(cosines, targets)
            check_golden(data, "aam", kinds, row, values, grads)


@pytest.mark.parametrize("inputs", ["logit", "cos"])
def test_golden_asl(inputs):
    data = dict(golden())
    kinds = ["hard", "ignore", "soft"]
    names = ["gamma_neg", "gamma_pos", "probability_margin", "label_smoothing", "scale"]
    with jax.enable_x64(True):
        x, targets = jnp.asarray(data[inputs]), golden_targets(data, kinds)
        for row, settings in enumerate(data["asl_params"].tolist()):
            options = dict(zip(names, settings, strict=True))
            grad = jax.value_and_grad(lambda x, t, o=options: asl(x, t, eps=1e-8, **o))
            values, grads = jax.vmap(grad, (None, 0))(x, targets)
            check_golden(data, f"asl_{inputs}", kinds, row, values, grads)


@pytest.mark.parametrize("inputs", ["logit", "cos"])
def test_golden_bce(inputs):
    data = dict(golden())
    kinds = ["hard", "ignore", "soft"]
    near = np.abs(data[inputs]) < 18  # the reference's clamp acts beyond
    rows = 0
    with jax.enable_x64(True):
        for row, settings in enumerate(data["asl_params"].tolist()):
            *focusing, label_smoothing, scale = settings
            if any(focusing) or scale != 1:
                continue
            rows += 1
            for kind in kinds:
                value, grad = value_and_grad(
                    bce,
                    data[inputs],
                    data[f"y_{kind}"],
                    label_smoothing=label_smoothing,
                )
                want = data[f"asl_{inputs}_{kind}_grad"][row]
                np.testing.assert_allclose(
                    grad[near], want[near], rtol=1e-9, atol=1e-12
                )
                if near.all():
                    want = data[f"asl_{inputs}_{kind}_loss"][row]
                    np.testing.assert_allclose(value, want, rtol=1e-10)
    assert rows


def test_golden_aam_float32():
    data = dict(golden())
    names = ["scale", "margin", "k", "gamma_neg", "gamma_pos", "probability_margin"]
    for row, want in zip(
        data["aam_f32_rows"], data["aam_f32_ignore_loss"], strict=True
    ):
        settings = data["aam_params"][row].tolist()
        options = dict(zip([*names, "label_smoothing"], settings, strict=True))
        got = aam(np.float32(data["cos"]), data["y_ignore"], **options)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("gammas", ["g00", "g41"])
@pytest.mark.parametrize("name", ["aam", "asl"])
def test_golden_edges(name, gammas):
    """Equal to the reference where it is finite, and finite everywhere."""
    data = golden()
    options = dict(gamma_neg=4.0, gamma_pos=1.0) if gammas == "g41" else {}
    options = {"gamma_neg": 0.0, "gamma_pos": 0.0} | options
    for dtype in ("f64", "f32"):
        table = data[f"edge_{name}_{dtype}_{gammas}"]
        with jax.enable_x64(dtype == "f64"):
            x = jnp.asarray(data["edge_x"])[:, None]
            for target in (0, 1):
                labels = np.full(x.shape, target)
                got = value_and_grad(LOSSES[name], x, labels, **options)
                assert all(np.isfinite(part).all() for part in got)
                grad = got[1][:, 0]
                value = [LOSSES[name](r[None], labels[:1], **options) for r in x]
                # The reference's `1 - p` loses digits where p is close to 1.
                for mine, column in ((np.stack(value), 0), (grad, 1)):
                    want = table[target, :, column]
                    known = np.isfinite(want)
                    np.testing.assert_allclose(
                        mine[known],
                        want[known],
                        rtol=1e-9 if dtype == "f64" else 1e-3,
                        atol=1e-7,
                    )
