"""Every setting reaches what it is a setting of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_preemption import settings  # noqa: F401 (fixture)

from mljax import config as configs
from mljax import run, step, thresholds, train
from mljax.data import augment
from mljax.models.batch_norm import BatchNorm
from mljax.operating_points import choose


class Recorded(Exception):
    pass


def recorder(into: dict):
    def record(*_, **options):
        into.update(options)
        raise Recorded

    return record


def options_of_step(settings, monkeypatch, at=1) -> dict:  # noqa: F811
    """What `step.make_train_step` is called with for step `at` of a run."""
    configs.validate(settings)
    found = {}
    with monkeypatch.context() as patch:
        patch.setattr(step, "make_train_step", recorder(found))
        made = train.setup(settings)
        batch = {"image": jnp.zeros((settings.batch_size, 4, 4, 3), jnp.uint8)}
        with pytest.raises(Recorded):
            made.step_at(at).lower(made.state, batch, made.seed)
    return found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sam.rho": 0.07, "sam.adaptive": True, "sam.update_stats": "first"},
            {
                "sam_rho": 0.07,
                "sam_adaptive": True,
                "sam_update_stats": "first",
                "sam_groups": None,
                "sam_every_images": 1,
                "sam_by_momentum": False,
                "sam_reuse": 0.0,
                "accumulate": 1,
                "is_pair": False,
                "frozen": None,
            },
        ),
        (
            {"sam.rho": 0.07, "sam.every_images": 2, "optim.accumulate": 2},
            {"sam_every_images": 2, "accumulate": 2},
        ),
        ({"sam.rho": 0.07, "sam.direction": "momentum"}, {"sam_by_momentum": True}),
        ({"sam.rho": 0.0}, {"sam_rho": 0.0}),
        ({"optim.clip_norm": 3.0}, {"clip_norm": 3.0}),
        ({"loss.reduction": "mean"}, {"reduction": "mean"}),
        ({"loss.reduction": "sum"}, {"reduction": "sum"}),
        ({"ema.half_life": 0.0, "ema.decay": 0.93}, {"ema_decay": 0.93}),
        ({"ema.half_life": 0.0, "ema.decay": 0.0}, {"ema_decay": 0.0}),
        ({"ema.half_life": 16.0}, {"ema_decay": 0.5}),  # images; the batch has 16
    ],
)
def test_of_the_step(settings, monkeypatch, changes, expected):  # noqa: F811
    settings.update_from_flattened_dict(changes)
    found = options_of_step(settings, monkeypatch)
    assert {key: found[key] for key in expected} == expected


def test_of_the_steps_with_and_without_a_perturbation(settings, monkeypatch):  # noqa: F811
    settings.sam.update(rho=0.07, every_steps=2, reuse=0.4)
    full, between = (options_of_step(settings, monkeypatch, at) for at in (1, 2))
    assert (full["sam_rho"], full["sam_reuse"]) == (0.07, 0.0)
    assert (between["sam_rho"], between["sam_reuse"]) == (0.0, 0.4)


def test_of_the_augmentation(monkeypatch):
    config, found = configs.common(), {}
    data = {
        "flip": 0.3,
        "cutout": 0.4,
        "cutout_side": 0.6,
        "mixup_alpha": 0.7,
        "cutmix_alpha": 0.8,
        "mixup_prob": 0.9,
        "mixup_switch_prob": 0.2,
    }
    jitter = {"brightness": 0.1, "contrast": 0.2, "saturation": 0.3, "hue": 0.4}
    config.data.update(data)
    config.data.jitter.update(jitter)
    monkeypatch.setattr(augment, "make_augment", recorder(found))
    with pytest.raises(Recorded):
        run.make_augment(config)
    assert found == {**data, "jitter": jitter}


def test_of_the_cutout():
    images = np.full((64, 16, 16, 3), 200, np.uint8)
    for side in (0.25, 0.5):
        erase = augment.make_augment(cutout=1.0, cutout_side=side)
        seen, _ = erase(images, np.zeros((64, 1), np.int8), jax.random.key(0))
        erased = np.asarray(seen)[..., 0] < 0.5  # 200 is 0.57
        assert erased.sum((1, 2)).max() == (side * 16) ** 2


@pytest.mark.parametrize("flip", [False, True])
def test_of_the_evaluation(settings, flip):  # noqa: F811
    settings.eval.flip = flip
    made = run.make_run(settings, ["a", "b"])
    params, stats = train.mutual.load(settings, made.make_model, ["a", "b"], "")[:2]
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)

    def outputs(images):
        found, _ = made.apply(params, stats, augment.normalise(images), train=False)
        return np.asarray(found)

    plain, mirrored = outputs(images), outputs(images[:, :, ::-1])
    assert np.abs(plain - mirrored).max() > 1e-3
    expected = (plain + mirrored) / 2 if flip else plain
    found = made.eval_step(params, stats, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_of_batch_norm(settings):  # noqa: F811
    settings.model.batch_norm_groups, settings.sam.rho = 4, 0.05
    for sam_groups, expected in ((1, {4}), (2, {2}), (4, {1})):
        settings.sam.groups = sam_groups
        configs.validate(settings)
        model = run.make_run(settings, ["a"]).make_model()
        norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]
        assert norms and {norm.groups for norm in norms} == expected


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], {"beta": 1.0, "shrink": 10.0}),
        (["--beta", "2"], {"beta": 2.0, "shrink": 10.0}),
        (["--recall", "0.9"], {"recall": 0.9, "shrink": 10.0}),
        (["--precision", "0.8"], {"precision": 0.8, "shrink": 10.0}),
        (["--shrink", "0"], {"beta": 1.0, "shrink": 0.0}),
    ],
)
def test_of_the_thresholds(flags, wanted):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (200, 4)).astype(np.float32)
    labels = (logits + rng.normal(0, 2, logits.shape) > 1).astype(np.int8)
    chooser = thresholds.chooser(thresholds.parse(["--checkpoint=x", *flags]))
    decided, _ = chooser(logits, labels)
    expected = choose(1 / (1 + np.exp(-logits)), labels, **wanted)
    np.testing.assert_allclose(decided.thresholds, expected.thresholds, rtol=1e-5)


def test_of_the_calibration():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (200, 4)).astype(np.float32)
    labels = (logits * [1, 2, 0.5, 1] + rng.normal(0, 2, logits.shape) > 1).astype(int)
    for flags, per_class in (([], False), (["--per-class"], True)):
        flags = ["--checkpoint=x", "--calibrate=platt", *flags]
        decided, _ = thresholds.chooser(thresholds.parse(flags))(logits, labels)
        expected = thresholds.calibration.fit(
            logits, labels, method="platt", per_class=per_class, shrink=10.0
        )
        np.testing.assert_array_equal(decided.calibration.scale, expected.scale)
        assert len(np.unique(expected.scale)) == (4 if per_class else 1)
