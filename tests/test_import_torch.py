"""Weights in and out: round trips, and one clear line for everything wrong."""

import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from configs.common import get_config
from mljax.errors import UserError
from mljax.models import build_head, build_model, import_torch, torch_files
from mljax.models.functional import split


def small_model(num_classes: int = 3, angular: bool = False, seed: int = 0):
    config = get_config().model
    config.backbone = "tf_mobilenetv3_large_minimal_100"
    return build_model(config, num_classes, angular=angular, rngs=nnx.Rngs(seed))


def assert_same_state(one: nnx.Module, other: nnx.Module) -> None:
    jax.tree.map(np.testing.assert_array_equal, split(one), split(other))


@pytest.mark.parametrize("angular", [False, True])
def test_round_trip(angular):
    model = small_model(angular=angular)
    state = import_torch.export(model)
    assert state["bn1.num_batches_tracked"] == 0
    assert state["conv_stem.weight"].shape == (16, 3, 3, 3)
    assert state["blocks.1.0.conv_dw.weight"].shape == (64, 1, 3, 3)
    assert state["conv_head.weight"].shape == (1280, 960, 1, 1)
    classifier = (1280, 3) if angular else (3, 1280)
    assert state["classifier.weight"].shape == classifier
    other = small_model(angular=angular, seed=1)
    import_torch.load(other, state)
    assert_same_state(model, other)


def test_layouts():
    head = build_head("linear", 2, 3, hidden=4, rngs=nnx.Rngs(0))
    state = {
        "conv_head.weight": np.arange(8.0).reshape(4, 2, 1, 1),
        "conv_head.bias": jnp.zeros(4),
        "classifier.weight": np.arange(12.0).reshape(3, 4),
        "classifier.bias": np.zeros(3),
    }
    import_torch.load(head, state)
    assert head.classifier.weight[1, 2] == state["classifier.weight"][2, 1]
    assert head.conv_head.weight[0, 0, 1, 2] == state["conv_head.weight"][2, 1]
    assert head.classifier.weight[...].dtype == jnp.float32


def test_torch_tensors_are_taken():
    class Tensor:  # what `load` uses of torch.Tensor
        def __init__(self, array):
            self.array = array

        def detach(self):
            return self

        cpu = detach

        def is_floating_point(self):
            return jnp.issubdtype(self.array.dtype, jnp.floating)

        def element_size(self):
            return self.array.itemsize

        def float(self):
            return Tensor(self.array.astype(np.float32))

        def __array__(self, dtype=None, copy=None):
            if self.array.dtype == ml_dtypes.bfloat16:
                raise TypeError("Got unsupported ScalarType BFloat16")
            return self.array

    head = build_head("linear", 2, 3, rngs=nnx.Rngs(0))
    weight = np.ones((3, 2), ml_dtypes.bfloat16)
    import_torch.load(
        head,
        {
            "classifier.weight": Tensor(weight),
            "classifier.bias": Tensor(np.zeros(3, np.float32)),
        },
    )
    assert (head.classifier.weight[...] == 1).all()
    for kind in (np.int8, np.uint8, np.bool_):
        with pytest.raises(UserError, match=f"{np.dtype(kind)}.*nothing quantised"):
            whole = Tensor(np.ones((3, 2), kind))
            import_torch.load(head, {"classifier.weight": whole})


def test_everything_wrong_is_listed_in_one_line_and_nothing_is_loaded():
    model, untouched = small_model(), small_model()
    state = import_torch.export(small_model(seed=1))
    del state["bn1.weight"], state["blocks.0.0.bn1.bias"]
    state["surprise"] = np.zeros(3)
    state["classifier.bias"] = np.zeros(4)
    with pytest.raises(UserError) as error:
        import_torch.load(model, state)
    message = str(error.value)
    for part in (
        "missing: ",
        "bn1.weight",
        "blocks.0.0.bn1.bias",
        "unexpected: surprise",
        "classifier.bias [4] instead of [3]",
    ):
        assert part in message
    assert "\n" not in message
    assert_same_state(model, untouched)


def test_fine_tuning_leaves_the_classifier_of_other_classes_out():
    state = import_torch.export(small_model(1000, seed=1))
    model, fresh = small_model(5, angular=True), small_model(5, angular=True)
    notes = import_torch.load_pretrained(model, state)
    assert len(notes) == 2
    assert "classifier.weight [1000, 1280]" in notes[0]
    assert "act2.weight" in notes[1]
    loaded = import_torch.export(model)
    np.testing.assert_array_equal(loaded["conv_head.bias"], state["conv_head.bias"])
    np.testing.assert_array_equal(loaded["conv_stem.weight"], state["conv_stem.weight"])
    np.testing.assert_array_equal(
        loaded["classifier.weight"], import_torch.export(fresh)["classifier.weight"]
    )


def test_fine_tuning_from_the_same_classes_loads_everything():
    trained, model = small_model(5, seed=1), small_model(5)
    assert import_torch.load_pretrained(model, import_torch.export(trained)) == []
    assert_same_state(model, trained)


def test_fine_tuning_is_otherwise_strict():
    state = import_torch.export(small_model(1000))
    del state["conv_head.weight"], state["bn1.bias"]
    state["blocks.9.weight"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        import_torch.load_pretrained(small_model(5), state)
    for part in ("conv_head.weight", "bn1.bias", "unexpected: blocks.9.weight"):
        assert part in str(error.value)


def test_a_head_without_conv_head_does_not_need_it():
    config = get_config().model
    state = import_torch.export(small_model(1000))
    config.backbone = "tf_mobilenetv3_large_minimal_100"
    model = build_model(config, 5, angular=False, rngs=nnx.Rngs(0))
    model.head = build_head("linear", 960, 5, rngs=nnx.Rngs(0))
    notes = import_torch.load_pretrained(model, state)
    assert any("conv_head" in note for note in notes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_read_safetensors(tmp_path, dtype):
    save_file({"a": np.ones((2, 3), dtype)}, tmp_path / "x.safetensors")
    state = torch_files.read(tmp_path / "x.safetensors").tensors
    assert state["a"].astype(np.float32).sum() == 6


def test_unreadable_files(tmp_path, monkeypatch):
    def message(name: str, content: bytes | None = None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            torch_files.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "no such file" in message("none.safetensors")
    assert "no such file" in message(".")
    save_file({"a": np.ones(1000, np.float32)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    assert "damaged" in message("half.safetensors", whole[:600])
    assert "damaged" in message("empty.safetensors", b"")
    assert "damaged" in message("text.safetensors", b"<html>not found</html>" * 9)
    assert "must end in" in message("x.ckpt", b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in message("x.pth", b"")


def test_read_pth_asks_torch_for_weights_only(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    import torch

    weight = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    torch.save({"epoch": 3, "state_dict": {"a.weight": weight}}, tmp_path / "x.pth")
    state = torch_files.read(tmp_path / "x.pth").tensors
    np.testing.assert_array_equal(state["a.weight"], np.arange(6.0).reshape(2, 3))
    torch.save({"a": types.SimpleNamespace()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="plain tensors"):
        torch_files.read(tmp_path / "code.pth")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pth").read_bytes()[:300])
    with pytest.raises(UserError, match="damaged"):
        torch_files.read(tmp_path / "cut.pt")
