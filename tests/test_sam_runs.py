"""The cheaper forms of SAM in whole runs, and the settings that choose them."""

import signal
from dataclasses import fields

import jax
import pytest
from runs import same_results
from small_model import make
from test_preemption import settings, stop_at  # noqa: F401
from test_step import assert_close, optimizer_for

from mljax import config as configs
from mljax import sharding, train
from mljax.checkpoint import Checkpoints
from mljax.errors import Stopped, UserError
from mljax.step import create_state

# A whole run


def test_a_run_goes_on_to_the_bits(settings, monkeypatch, tmp_path, capsys):  # noqa: F811
    settings.epochs, settings.sam.rho, settings.sam.every_steps = 2, 0.05, 3
    configs.validate(settings)
    train.train(settings, str(tmp_path / "whole"))
    run = str(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 6, signal.SIGTERM)  # the last full step is 4, the next one 7
        train.train(settings, run)
    assert "resumed" not in capsys.readouterr().out
    train.train(settings, run)
    assert "resumed at step 6" in capsys.readouterr().out
    same_results(tmp_path / "whole", tmp_path / "run")


def test_a_program_for_each_kind_of_step(settings):  # noqa: F811
    settings.sam.rho, settings.sam.every_steps = 0.05, 3
    settings.optim.freeze, settings.optim.freeze_epochs = "backbone.conv", 1
    made = train.setup(settings)  # four steps an epoch
    kinds = [made.step_at(at) for at in range(1, 11)]
    full, between, later, later_between = kinds[0], kinds[1], kinds[6], kinds[4]
    assert len({full, between, later, later_between}) == 4
    assert kinds == [
        *(full, between, between, full),
        *(later_between, later_between, later),
        *(later_between, later_between, later),
    ]


def test_a_checkpoint_from_before_the_direction_is_loaded(tmp_path):
    params, stats = make()
    optimizer = optimizer_for(params)
    state = create_state(params, stats, optimizer, False)
    names = {field.name for field in fields(state)} - {"sam_direction"}
    saved = Checkpoints(tmp_path / "saved")
    saved.save(1, {name: getattr(state, name) for name in names}, {})
    saved.wait()
    places = sharding.state_sharding(state, sharding.make_mesh())
    loaded = saved.load(1, sharding.abstract(state, places))
    saved.close()
    assert_close(jax.device_get(loaded), jax.device_get(state), rtol=0, atol=0)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "momentum", "rho": 0.0}, "without config.sam.rho above 0"),
        ({"every_steps": 2, "rho": 0.0}, "without config.sam.rho above 0"),
        ({"every_images": 2, "rho": 0.0}, "without config.sam.rho above 0"),
        ({"reuse": 0.5}, "without config.sam.every_steps above 1"),
        ({"direction": "momentum", "every_steps": 2}, "sam.direction = gradient"),
        ({"direction": "momentum", "every_images": 2}, "sam.direction = gradient"),
        ({"direction": "momentum", "groups": 2}, "sam.direction = gradient"),
        ({"direction": "momentum", "adaptive": True}, "sam.direction = gradient"),
        ({"direction": "momentum", "update_stats": "first"}, "direction = gradient"),
        ({"direction": "up"}, "one of gradient, momentum"),
        ({"every_steps": 0}, "must be above 0"),
        ({"every_images": 0}, "must be above 0"),
        ({"reuse": -1.0, "every_steps": 2}, "must be 0 or more"),
        ({"every_images": 4, "every_steps": 5}, r"set one of the two to 1, or .*reuse"),
        ({"every_images": 5}, "batch_size = 84 must be divisible by 5"),
    ],
)
def test_settings_of_no_use_are_refused(changes, message):
    config = configs.common()
    config.data.root = "somewhere"
    config.model.batch_norm_groups = changes.get("groups", 1)
    config.sam.update(changes)
    with pytest.raises(UserError, match=message) as error:
        configs.validate(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": "momentum"},
        {"every_steps": 5, "reuse": 0.5, "groups": 2, "adaptive": True},
        {"every_steps": 5, "reuse": 0.0, "every_images": 4},
        {"every_images": 4, "update_stats": "first"},
    ],
)
def test_settings_that_go_together(changes):
    config = configs.common()
    config.data.root = "somewhere"
    config.model.batch_norm_groups = changes.get("groups", 1)
    config.sam.update(changes)
    configs.validate(config)


@pytest.mark.parametrize("name, key", [("sgd", "momentum"), ("adamw", "b1")])
def test_without_momentum_there_is_no_direction(name, key):
    config = configs.common()
    config.data.root, config.sam.direction = "somewhere", "momentum"
    config.optim.update({"name": name, key: 0.0})
    configs.validate(config)  # the schedule replaces it
    config.optim.schedule = "cosine"
    with pytest.raises(UserError, match=rf"set config\.optim\.{key} above 0"):
        configs.validate(config)


def test_shares_of_the_first_pass_are_equal():
    config = configs.common()
    config.batch_size, config.eval.batch_size, config.sam.every_images = 80, 128, 4
    config.optim.accumulate = 2
    configs.validate_devices(config, 4)
    with pytest.raises(UserError, match=r"the 8 devices; .* by 32; 64 would do"):
        configs.validate_devices(config, 8)
