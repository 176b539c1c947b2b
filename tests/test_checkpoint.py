"""Saving and loading with Orbax."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mljax import checkpoint, sharding
from mljax.errors import UserError


def state(value: float) -> dict:
    kernel = value * jnp.arange(2**16, dtype=jnp.float32).reshape(256, 256)
    return {"params": {"kernel": kernel}, "batch_stats": {"mean": jnp.ones(3)}}


def test_save_load_keep_two(tmp_path):
    saves = checkpoint.Checkpoints(tmp_path / "run")
    assert saves.latest() is None
    for step in (1, 2, 3):
        saves.save(step, state(step), {"step": step, "nested": {"a": [None, "ü"]}})
    saves.close()
    saves = checkpoint.Checkpoints(tmp_path / "run")
    assert saves.latest() == 3
    assert saves.about(3) == {"format": 1, "step": 3, "nested": {"a": [None, "ü"]}}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["2", "3"]
    saves.drop_after(2)
    assert saves.latest() == 2
    saves.close()


def test_load_onto_another_mesh(tmp_path):
    saves = checkpoint.Checkpoints(tmp_path / "run")
    one = state(1.0)
    mesh = sharding.make_mesh(2, 4)
    saves.save(5, sharding.place(one, sharding.state_sharding(one, mesh)), {})
    saves.wait()
    for shape in ((8, 1), (1, 8)):
        other = sharding.state_sharding(one, sharding.make_mesh(*shape))
        loaded = saves.load(5, sharding.abstract(one, other))
        jax.tree.map(np.testing.assert_array_equal, loaded, one)
        assert loaded["params"]["kernel"].sharding == other["params"]["kernel"]
    saves.close()


def test_weights_alone_and_plain_orbax(tmp_path):
    saves = checkpoint.Checkpoints(tmp_path / "run" / "best")
    whole = {**state(2.0), "opt_state": {"trace": jnp.zeros(4)}}
    saves.save(7, whole, {"class_names": ["a"]})
    saves.close()
    step = checkpoint.find_best(tmp_path / "run")
    assert step == checkpoint.find_best(step) == tmp_path / "run" / "best" / "7"
    variables, about = checkpoint.load_variables(step)
    assert set(variables) == {"params", "batch_stats"}
    assert about["class_names"] == ["a"]
    np.testing.assert_array_equal(
        variables["params"]["kernel"], whole["params"]["kernel"]
    )
    plain = ocp.load(step)
    np.testing.assert_array_equal(plain["params"]["kernel"], whole["params"]["kernel"])


def test_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find_best(tmp_path)
    with pytest.raises(UserError, match="there is no such directory"):
        checkpoint.find_best(tmp_path / "nowhere")
    for step in (9, 12):
        (tmp_path / "stopped" / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "stopped" / "best").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint of an evaluation .*points/12$"):
        checkpoint.find_best(tmp_path / "stopped")
    saves = checkpoint.Checkpoints(tmp_path / "run")
    saves.save(1, state(1.0), {})
    saves.wait()
    wrong = {"params": {"kernel": jnp.zeros((2, 2))}, "batch_stats": {}}
    with pytest.raises(UserError) as error:
        saves.load(1, wrong)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    saves.close()
    with pytest.raises(UserError, match="newer mljax"):
        checkpoint.check_format({"format": 99}, tmp_path)
    with pytest.raises(UserError, match="not a checkpoint of mljax"):
        checkpoint.check_format(None, tmp_path)


@pytest.mark.parametrize("damage", ["half", "bits", "description", "empty"])
def test_a_damaged_step_says_how_to_go_on(tmp_path, damage):
    saves = checkpoint.Checkpoints(tmp_path / "run")
    for step in (4, 8):
        saves.save(step, state(float(step)), {})
        saves.wait()
    abstract = jax.tree.map(jnp.zeros_like, state(0.0))
    folder = tmp_path / "run" / "8"
    if damage == "description":
        (folder / "_CHECKPOINT_METADATA").write_text("{")
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        data = file.read_bytes()
        if damage == "half":
            file.write_bytes(data[: len(data) // 2])
        elif damage == "bits" and len(data) > 1:
            middle = len(data) // 2
            changed = bytes([data[middle] ^ 255])
            file.write_bytes(data[:middle] + changed + data[middle + 1 :])
        elif damage == "empty":
            file.unlink()
    words = f"move {folder} away to go on from step 4$"
    with pytest.raises(UserError, match=words):
        saves.about(8)
    if damage in ("half", "empty"):  # of the arrays, too
        with pytest.raises(UserError, match=words):
            saves.load(8, abstract)
    folder.rename(tmp_path / "away")
    saves = checkpoint.Checkpoints(tmp_path / "run")
    assert saves.latest() == 4
    found = saves.load(4, abstract)
    jax.tree.map(np.testing.assert_array_equal, found, state(4.0))
    saves.close()


def test_a_save_is_finished_when_training_fails(tmp_path, monkeypatch):
    saves = checkpoint.Checkpoints(tmp_path / "run")
    writing = saves._orbax.save_async

    def slowly(*args, **options):
        pending = writing(*args, **options)

        class Later:
            def result(self):
                time.sleep(0.3)
                found.append(pending.result())

        return Later()

    found = []
    monkeypatch.setattr(saves._orbax, "save_async", slowly)
    with pytest.raises(UserError, match="cannot be read"), checkpoint.finishing(saves):
        saves.save(1, state(1.0), {})
        raise UserError("photo.jpg: cannot be read")
    assert found and (tmp_path / "run" / "1").is_dir()
    with pytest.raises(KeyboardInterrupt), checkpoint.finishing(saves):
        saves.save(2, state(2.0), {})
        raise KeyboardInterrupt  # the second one: at once
    assert len(found) == 1
    saves.close()


def test_an_unfinished_save_is_never_loaded(tmp_path):
    saves = checkpoint.Checkpoints(tmp_path / "run")
    saves.save(1, state(1.0), {})
    saves.close()
    # What a process leaves that dies while it writes step 2.
    part = tmp_path / "run" / "2.orbax-checkpoint-tmp"
    part.mkdir()
    (part / "half").write_text("x")
    saves = checkpoint.Checkpoints(tmp_path / "run")
    assert saves.latest() == 1
    # It is removed in the background, at the latest before something is saved.
    saves.save(2, state(2.0), {})
    saves.close()
    assert not part.exists() and saves.latest() == 2
