"""`python -m mljax.import_weights`: one line for every mistake; files of scripts."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file
from small_networks import SMALL, call, same, save_run, timm_file

from mljax import checkpoint, import_weights
from mljax.models import (
    BACKBONES,
    paper_names,
)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name, make in SMALL.items():
        monkeypatch.setitem(BACKBONES, name, make)
    monkeypatch.setattr(paper_names, "_BACKBONES", tuple(SMALL))


def test_nothing_is_overwritten(tmp_path, capsys):
    file, _ = timm_file(tmp_path, "small_resnet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "empty").mkdir()
    flags = "--model", "small_resnet", "--from", file, "--to"
    for taken in ("full", "full/mine"):
        assert "exists already" in call(capsys, *flags, tmp_path / taken)
    call(capsys, *flags, tmp_path / "empty")
    assert "exists already" in call(capsys, *flags, tmp_path / "empty")
    export = "--export", "--from", tmp_path / "empty", "--to"
    assert "exists already" in call(capsys, *export, file)
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_only_finite_floating_point_numbers_are_taken(tmp_path, capsys):
    file, state = timm_file(tmp_path, "small_resnet")
    whole = state["conv1.weight"]
    flags = "--model", "small_resnet", "--from", file, "--to", tmp_path / "out"
    for weight, words in (
        (whole * np.nan, "have NaN or infinity in conv1.weight"),
        ((100 * whole).astype(np.int8), "conv1.weight as int8: only floating-point"),
    ):
        save_file(state | {"conv1.weight": weight}, file)
        assert words in call(capsys, *flags)
    header = {"x": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    assert "damaged or not a safetensors file" in call(capsys, *flags)
    assert not (tmp_path / "out").exists()
    save_file(state | {"conv1.weight": whole.astype(np.float16)}, file)
    assert "written: " in call(capsys, *flags)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    file, state = timm_file(tmp_path, "small_resnet")
    del state["bn1.weight"], state["bn1.bias"]
    state["surprise"] = np.zeros(3, np.float32)
    state["conv1.weight"] = np.zeros((8, 3, 7, 7), np.float32)
    save_file(state, tmp_path / "bad.safetensors")
    save_run(tmp_path / "run", "small_resnet", "ml_decoder", "aam")
    decoder = tmp_path / "decoder.safetensors"
    call(capsys, "--export", "--from", tmp_path / "run", "--to", decoder)
    (tmp_path / "two.txt").write_text("a\nb\n")

    def says(*flags, model="small_resnet", source=file):
        flags = "--from", source, "--to", tmp_path / "out", *flags
        return call(capsys, *flags, *(("--model", model) if model else ()))

    message = says(source=tmp_path / "bad.safetensors")
    for part in (
        "bad.safetensors",
        "missing: bn1.weight, bn1.bias",
        "unexpected: surprise",
        "conv1.weight [8, 3, 7, 7] instead of",
    ):
        assert part in message
    assert "one of mobilenetv3_large_100" in says(model="resnet5")
    assert "--model : must be one of" in says(model=None)
    assert "no such file" in says(source=tmp_path / "none.safetensors")
    assert "--head ml_decoder, not linear" in says(source=decoder)
    assert "--loss is missing" in says("--head", "ml_decoder", source=decoder)
    assert "--head linear, not gcn" in says("--head", "gcn")
    assert "--loss aam" in says("--loss", "aam")
    assert "must name 10 different" in says("--classes", tmp_path / "two.txt")
    assert "none.txt: No such file" in says("--classes", tmp_path / "none.txt")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    assert "photo.jpg: is no text" in says("--classes", tmp_path / "photo.jpg")
    (tmp_path / "half.json").write_text("[")
    assert "half.json: is not valid JSON" in says("--classes", tmp_path / "half.json")
    assert "has no keys" in says("--key", "state_dict")
    assert "did you mean model.pool" in says("--config.model.pol=max")
    assert "must be one of avg" in says("--config.model.pool=mean")
    assert "use --model" in says("--config.model.head=gcn")
    export = "--export", "--from", tmp_path / "run", "--to"
    assert "must end in" in call(capsys, *export, tmp_path / "out.onnx")
    assert "holds no checkpoint" in call(
        capsys, "--export", "--from", tmp_path, "--to", tmp_path / "out.safetensors"
    )
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


@pytest.mark.parametrize(
    "flags",
    [
        ["--from=a"],
        ["--from=a", "--to=b", "--names=paper"],
        ["--from=a", "--to=b", "--export", "--model=resnet"],
        ["--from=a", "--to=b", "--export", "--config.model.pool=max"],
        ["--from=a", "--to=b", "--mode=x"],
        ["--from=a", "--to=b", "--config.model.pool", "max"],
        ["--from=a", "--to=b", "--head=vit"],
    ],
)
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        import_weights.main(flags)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom mljax import import_weights\n"
        "try: import_weights.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'flax', 'numpy', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


class FakeTensor(np.ndarray):
    """Stands in for torch.Tensor where torch is not installed."""


def tensors(state):
    return {name: np.array(value).view(FakeTensor) for name, value in state.items()}


def test_checkpoints_of_training_scripts(tmp_path, capsys, monkeypatch):
    _, state = timm_file(tmp_path, "small_resnet", classes=3)
    averaged = {k: v + 1 for k, v in state.items()}
    content = {
        "state_dict": tensors({f"module.{k}": v for k, v in state.items()}),
        "epoch": 7,
        "optimizer": {"state": {}},
        "classes_map": {"cat": 1, "ant": 0, "dog": 2},
    }
    calls = []

    def load(path, **options):
        calls.append(options)
        return content

    fake = types.SimpleNamespace(load=load, Tensor=FakeTensor)
    monkeypatch.setitem(sys.modules, "torch", fake)
    for name in ("model-best.pth.tar", "main_model.pth.tar-60", "best.pth"):
        (tmp_path / name).write_bytes(b"")
        flags = "--model", "small_resnet", "--from", tmp_path / name, "--to"
        said = call(capsys, *flags, tmp_path / f"{name} dir")
        assert "3 classes" in said and "note" not in said
    assert all(options["weights_only"] for options in calls)
    variables, about = checkpoint.load_variables(tmp_path / "best.pth dir")
    assert about["class_names"] == ["ant", "cat", "dog"]
    stem = variables["params"]["backbone"]["conv1"]["weight"]
    np.testing.assert_array_equal(stem.transpose(3, 2, 0, 1), state["conv1.weight"])

    content["state_dict_ema"] = tensors(averaged)
    for key, expected in (("", averaged), ("state_dict", state)):
        to = tmp_path / f"with {key}"
        said = call(capsys, *flags, to, *(("--key", key) if key else ()))
        assert f"under {key or 'state_dict_ema'}; not read: state_dict" in said
        stem = checkpoint.load_variables(to)[0]["params"]["backbone"]["conv1"]["weight"]
        np.testing.assert_array_equal(
            stem.transpose(3, 2, 0, 1), expected["conv1.weight"]
        )
    said = call(capsys, *flags, tmp_path / "x", "--key", "models")
    assert "has state_dict_ema, state_dict" in said
    content = {"weights": [1, 2]}
    assert "holds no state dict" in call(capsys, *flags, tmp_path / "x")


def test_pth_with_torch(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    save_run(tmp_path / "run", "small_mobile", "gcn", "aam")
    file = tmp_path / "x.pth"
    flags = "--names", "paper", "--from", tmp_path / "run", "--to", file
    call(capsys, "--export", *flags)
    state = torch.load(file, weights_only=True)
    assert state["backbone.model.bn1.num_batches_tracked"].shape == ()
    assert state["backbone.model.bn1.num_batches_tracked"].dtype == torch.int64
    same_file = tmp_path / "x.safetensors"
    call(capsys, "--export", *flags[:-1], same_file)
    for name, value in load_file(same_file).items():
        np.testing.assert_array_equal(state[name].numpy(), value)
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "latest.pth")
    flags = "--model", "small_mobile", "--head", "gcn", "--to", tmp_path / "dir"
    call(capsys, *flags, "--from", tmp_path / "latest.pth")
    ours, back = (
        checkpoint.load_variables(checkpoint.find_best(tmp_path / name))[0]
        for name in ("run", "dir")
    )
    same(ours, back)
