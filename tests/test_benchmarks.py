"""The benchmarks beside a peer, on networks of one layer; the peer is left out."""

import json
import statistics
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytestmark = pytest.mark.usefixtures("small_backbones")
BACKBONE = "small_resnet"
# What a worker does when it is started with `python -c`.
ECHO = """
import sys
sys.path.insert(0, sys.argv[1])
from side_by_side import answer
calls = []
def step():
    calls.append(0)
    return {"calls": len(calls)}
print("a library says something")
answer({"name": "echo"}, {"one": step, "two": lambda: 3.0})
"""


@pytest.fixture(autouse=True)
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    import side_by_side

    monkeypatch.setattr(side_by_side, "PAUSE", 0)


def call(monkeypatch, script, folder: Path, *flags: str) -> dict:
    """Runs a benchmark, its workers in this process; what it writes."""
    from side_by_side import perform

    class Here:
        def __init__(self, command, **environment):
            monkeypatch.setattr(sys, "argv", command[1:])
            args = script.arguments()
            self.about, self.runs = script.contestant(args, Path(args.worker))
            # As it comes through a pipe.
            self.about = json.loads(json.dumps(self.about))
            self.about["variants"] = list(self.runs)

        def ask(self, variant, steps=1, warm=0):
            return json.loads(json.dumps(perform(self.runs, variant, steps, warm)))

        def end(self):
            pass

    file = folder / "found.json"
    monkeypatch.setattr(script, "Worker", Here)
    monkeypatch.setattr(sys, "argv", ["benchmark", f"--output={file}", *flags])
    script.main()
    return json.loads(file.read_text())


def test_workers_take_turns():
    from side_by_side import Worker, in_turns, summary

    command = [sys.executable, "-c", ECHO, str(ROOT / "benchmarks")]
    workers = {name: Worker(command) for name in ("ours", "theirs")}
    assert workers["ours"].about == {"name": "echo", "variants": ["one", "two"]}
    times = in_turns(workers, rounds=2, steps=3, warm=1, ending="ne")
    assert {name: len(ms) for name, ms in times.items()} == {
        "ours one": 6,
        "theirs one": 6,
    }
    found = summary(times)
    assert found["median_ms"]["ours one"] == statistics.median(times["ours one"])
    for worker in workers.values():
        values = worker.ask("one", 2)["values"]
        assert [value["calls"] for value in values] == [9, 10]
        assert worker.ask("two")["values"] == [None]
        worker.end()
        assert worker.process.returncode


def test_what_differs_is_not_timed():
    from side_by_side import same

    assert same("x", [1.0, 2.0], [1.0, 2.001], 1e-3) == pytest.approx(0.001 / 2.001)
    for wrong in ([1.0, 2.01], [1.0, float("nan")]):
        with pytest.raises(SystemExit, match="^x differ by "):
            same("x", wrong, [1.0, 2.0], 1e-3)
    with pytest.raises(SystemExit):
        same("x", 1.0, 2.0, 1e-3)


def test_inference(monkeypatch, tmp_path, capsys):
    import inference

    from mljax.errors import UserError
    from mljax.formats import onnx_file

    def absent(name):
        raise UserError(f"No module named {name!r}")

    monkeypatch.setattr(onnx_file, "require", absent)
    found = call(
        monkeypatch,
        inference,
        tmp_path,
        *("--models", BACKBONE, "--head", "gcn", "--size", "16"),
        *("--batch", "1", "3", "--rounds", "2", "--steps", "1"),
    )
    (result,) = found["models"].values()
    assert set(result["median_ms"]) == {"mljax batch 1", "mljax batch 3"}
    assert "not installed" in result["about"]["onnx"]["missing"]
    shown = capsys.readouterr().out
    assert f"{BACKBONE} + gcn, 16 px" in shown and "onnx: not installed" in shown
    rate = 3e3 / result["median_ms"]["mljax batch 3"]
    assert f"{rate:.1f} images/s" in shown


def test_inference_of_other_outputs_is_refused(monkeypatch, tmp_path):
    import inference

    def shifted(config, folder):
        return lambda images: np.full((len(images), 80), 0.75), {}

    monkeypatch.setattr(inference, "onnx", shifted)
    with pytest.raises(SystemExit, match="onnx and mljax differ"):
        call(
            monkeypatch,
            inference,
            tmp_path,
            *("--models", BACKBONE, "--size", "16", "--batch", "1"),
        )


def test_what_heads_cost(monkeypatch, tmp_path, capsys):
    import label_graph

    found = call(
        monkeypatch,
        label_graph,
        tmp_path,
        *("--backbone", BACKBONE, "--heads", "linear", "gcn", "--labels", "6"),
        *("--size", "16", "--batch", "8", "--rounds", "1", "--steps", "1"),
    )["labels"]["6"]
    costs, medians = found["costs"], found["median_ms"]
    # 12 features: the graph layers are 300 -> 12 -> 12, for 6 labels.
    more = costs["gcn"]["parameters"] - costs["linear"]["parameters"]
    assert more == 300 * 12 + 12 * 12
    assert costs["linear"]["image"] == costs["gcn"]["image"] == 12 * 6
    gate = 6 * 300 * 12 + 6 * 6 * 12 + 6 * 12 * 12 + 6 * 6 * 12
    assert costs["gcn"]["step"] - costs["linear"]["step"] == gate
    parts = ("step", "alone", "inference")
    assert set(medians) == {f"mljax {h} {p}" for h in ("linear", "gcn") for p in parts}
    extra = medians["mljax gcn step"] - medians["mljax linear step"]
    assert f"({extra:+.1f}, " in capsys.readouterr().out


def test_an_epoch_beside_its_steps(monkeypatch, tmp_path, capsys):
    import end_to_end

    rng = np.random.default_rng(0)
    rows = []
    for i in range(48):
        pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
        rows.append([f"{i}.jpg", ["even" if i % 2 else "odd"]])
    for split in ("train", "val"):
        listed = {"classes": ["even", "odd"], "images": rows}
        (tmp_path / f"{split}.json").write_text(json.dumps(listed))
    found = call(
        monkeypatch,
        end_to_end,
        tmp_path,
        *("--root", str(tmp_path), "--backbone", BACKBONE, "--size", "16"),
        *("--batch", "8", "--rounds", "1", "--steps", "2"),
        *("--set", "config.data.prefetch=1"),
    )
    assert found["about"]["mljax"]["steps_per_epoch"] == 6
    row = found["results"]["mljax"]
    assert row["share_of_bare"] == row["epoch"] / row["bare"] and row["data"] > 0
    assert 0 <= row["waiting_s"] <= row["epoch_s"]
    shown = capsys.readouterr().out
    assert f"{100 * row['share_of_bare']:.1f}%" in shown and "for data)" in shown


def test_rates_of_an_epoch():
    import end_to_end

    marks = [(0, 1), (5, 5), (5, 6), (7, 8), (8, 10)]
    found = end_to_end.rates(marks, 8)
    assert found == {"images_per_second": 4, "seconds": 4, "waiting_s": 3}


@pytest.mark.parametrize("head", ["linear", "gcn", "gat", "ml_decoder"])
def test_heads_of_pytorch_are_ours(head):
    torch = pytest.importorskip("torch", reason="the peer's environment has torch")
    import our_step
    import torch_heads

    from mljax.models import import_torch

    model = our_step.build(our_step.settings(BACKBONE, head), 7)
    tensors = import_torch.export(model.head)
    weights = {name: torch.tensor(np.array(x)) for name, x in tensors.items()}
    peer = torch_heads.HEADS[head](weights, None).eval()
    fmap = np.random.default_rng(0).random((2, 3, 3, 12)).astype(np.float32)
    expected = peer(torch.tensor(fmap.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(model.head(fmap), expected, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "gcn"])
def test_first_step_of_pytorch_is_ours(head, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch", reason="the peer's environment has torch")
    import our_step
    import torch_step

    class Small(torch.nn.Module):
        """As `small_networks.Small`."""

        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 12, 3, 8, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(12)

        def forward_features(self, x):
            return torch.relu(self.bn1(self.conv1(x)))

    monkeypatch.setattr(torch_step.timm, "create_model", lambda *a, **k: Small())
    config = our_step.settings(BACKBONE, head, size=16)
    model, batch = our_step.build(config, 7), our_step.draw_batch(4, 16, 7)
    our_step.write_weights(tmp_path, model, head)
    np.savez(tmp_path / "batch.npz", **batch)
    args = Namespace(backbone=BACKBONE, dtype="float32")
    ours = our_step.Training(config, model, batch)
    peer = torch_step.Training(args, tmp_path, torch.channels_last, head)
    assert peer.loss().item() == pytest.approx(our_step.loss(config, model, batch))
    # The second pass of SAM; the rates of the first steps are not the same.
    assert peer.step() == pytest.approx(ours.step(), rel=1e-4)


def test_a_training_step_on_a_gpu_is_set_against_its_peak(capsys):
    import train_step

    args = Namespace(backbone="any", size=448, batch=32, dtype="bfloat16", output=None)
    ours = {"gflop": 5000, "peak_tflops": 1000.0, "peak_memory_gb": 7.44}
    about = {"mljax": ours, "torch": {"peak_memory_gb": 9.0}}
    train_step.report(args, about, {"mljax": [50.0], "torch channels_last": [100.0]})
    out = capsys.readouterr().out
    assert "640.0 images/s  10 % of 1000 TFLOP/s" in out
    assert "320.0 images/s  5 % of 1000 TFLOP/s" in out
    assert "mljax is 2.00 times as fast as torch" in out
    assert "mljax: 7.4 GB of the device's" in out and "torch: 9.0 GB of the" in out
