"""Exported models are the checkpoint, whatever the batch."""

import importlib.util
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from full_disk import small_files
from jax import export as jax_export
from PIL import Image
from small_networks import SMALL
from test_label_graph import some_graph

from mljax import checkpoint, decision, export, predict
from mljax import config as configs
from mljax.calibration import Calibration
from mljax.data import augment
from mljax.data.shapes import CLASS_NAMES
from mljax.decision import Decision
from mljax.errors import UserError
from mljax.formats import FORMATS, onnx_file
from mljax.label_graph_data import LabelGraph
from mljax.models import BACKBONES, HEADS, build_model, cpu, pretrained
from mljax.models.batch_norm import BatchNorm
from mljax.models.functional import split

NAMES = CLASS_NAMES
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "jax2onnx", "onnxruntime"))),
    reason=f"needs {onnx_file.INSTALL}",
)
needs_proc = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a folder that nobody can write to"
)
EVERY_FORMAT = [
    pytest.param(name, marks=needs_onnx if name == "onnx" else ()) for name in FORMATS
]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name, make in SMALL.items():
        monkeypatch.setitem(BACKBONES, name, make)


def take_statistics(model, size):
    """BatchNorm's statistics are those of the sample pictures, as after training.

    Otherwise the values grow from layer to layer, and what is rounded grows with them.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    model(augment.normalise(export.samples(size, size)), train=True, rngs=nnx.Rngs(0))


def save_run(
    folder,
    head="gcn",
    backbone="small_mobile",
    size=32,
    decided=True,
    flip=False,
    statistics=False,
):
    """A work directory as training and mljax.thresholds leave it."""
    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone, config.model.head = backbone, head
    config.model.ml_decoder.update(dim=32, heads=2, feedforward=64)
    config.model.query2label.update(dim=32, heads=2, feedforward=64)
    config.data.image_size, config.data.num_val = size, 16
    config.eval.flip = flip
    config.dtype = "bfloat16"  # exports compute in float32 all the same
    graph = None
    if head in ("gcn", "gat"):
        given = some_graph(len(NAMES))
        graph = LabelGraph(NAMES, given["adjacency"], given["embeddings"], 0.4, [])
    model = build_model(
        config.model, len(NAMES), angular=True, rngs=nnx.Rngs(0), graph=graph
    )
    if statistics:
        take_statistics(model, size)
    params, batch_stats = split(model)
    saves = checkpoint.Checkpoints(folder / "best")
    weights = {"params": params, "batch_stats": batch_stats}
    saves.save(3, weights, {"config": config.to_dict(), "class_names": NAMES})
    saves.close()
    if decided:
        rng = np.random.default_rng(0)
        scale, bias, thresholds = rng.uniform(0.2, 0.8, (3, 14)).astype(np.float32)
        chosen = Decision(thresholds, Calibration(scale, bias), {})
        decision.save(folder / "best" / "3", NAMES, chosen)
    return folder


def call(capsys, *arguments) -> str:
    """Runs the command; what it printed. Errors are one line."""
    code = export.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == (1 if err else 0), err
    if err:
        assert err.startswith("error: ") and err.count("\n") == 1, err
    return err or out


def flags(run, form, output):
    return ["--checkpoint", run, "--format", form, "--output", output]


def restored(run):
    """The checkpoint's predictor, in float32 as the exports."""
    model, about = pretrained.restore(run, "float32")
    return predict.from_model(model, about, decision.load(*_step(run)))


def outputs_of(form, path):
    return f"{path}.onnx" if form == "onnx" else str(path)


@pytest.mark.parametrize(
    ("form", "head"),
    [
        ("stablehlo", "gcn"),
        ("savedmodel", "linear"),
        *(
            pytest.param("onnx", head, marks=needs_onnx)
            for head in ("linear", "gcn", "ml_decoder")
        ),
    ],
)
def test_an_export_is_the_checkpoint(form, head, tmp_path, capsys):
    run = save_run(tmp_path / "run", head)
    output = outputs_of(form, tmp_path / "model")
    assert "differ by at most" in call(capsys, *flags(run, form, output))
    reference = restored(run)
    found = export.load(output)
    assert found.class_names == NAMES
    np.testing.assert_array_equal(found.thresholds, reference.thresholds)
    serve, described = FORMATS[form].read(Path(output))
    assert described["class_names"] == NAMES and described["image_size"] == [32, 32]
    for batch in (1, 5, 8):
        images = np.random.default_rng(batch).integers(
            0, 256, (batch, 32, 32, 3), np.uint8
        )
        expected = reference.predict(images)
        np.testing.assert_allclose(found.predict(images), expected, atol=1e-6)
        p, labels = map(np.asarray, serve(images))
        assert p.dtype == np.float32 and labels.dtype == bool
        np.testing.assert_array_equal(labels, p > reference.thresholds)
        assert np.ptp(p) > 0.05 and labels.any() and not labels.all()
    Image.fromarray(images[0]).save(tmp_path / "photo.png")
    listed = found.labels([tmp_path / "photo.png"])
    assert listed == reference.labels([tmp_path / "photo.png"])


def _step(run):
    return run / "best" / "3", NAMES


def test_a_network_without_statistics(tmp_path):
    """As ViT: it has no BatchNorm."""
    from mljax.formats import program, stablehlo

    def function(weights, images):
        assert weights["batch_stats"] == {}
        p = weights["params"]["w"] * images.mean((1, 2))
        return p, p > 0.5

    weights = {"params": {"w": np.float32([1, 2, 3])}, "batch_stats": {}}
    about = {"format": program.FORMAT, "image_size": [8, 8]}
    stablehlo.write(program.Program(function, weights, about), tmp_path / "model")
    run, _ = stablehlo.read(tmp_path / "model")
    p, _ = run(np.ones((5, 8, 8, 3), np.uint8))
    np.testing.assert_array_equal(p, [[1, 2, 3]] * 5)


@pytest.mark.parametrize("form", ["stablehlo"])
def test_what_differs_is_refused(form, tmp_path, capsys, monkeypatch):
    run = save_run(tmp_path / "run", "linear")
    output = Path(outputs_of(form, tmp_path / "model"))
    write = FORMATS[form].write

    def other(program, path):
        def function(weights, images):
            p, labels = program.function(weights, images)
            return p + 2 * export.TOLERANCE, labels

        write(program._replace(function=function), path)

    monkeypatch.setattr(FORMATS[form], "write", other)
    assert "not the checkpoint" in call(capsys, *flags(run, form, output))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_nothing_is_overwritten(tmp_path, capsys):
    form = "savedmodel"  # a directory
    run = save_run(tmp_path / "run", "linear", decided=False)
    output = tmp_path / "model"
    arguments = flags(run, form, output)
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    assert "exists" in call(capsys, *arguments)
    assert "no " + form in call(capsys, *arguments, "--overwrite")
    assert (output / "thesis.txt").read_text() == "mine"
    (output / "thesis.txt").unlink()
    output.rmdir()
    call(capsys, *arguments)
    assert export.load(output).thresholds.tolist() == [0.5] * 14
    assert "exists" in call(capsys, *arguments)
    decision.save(*_step(run), Decision(np.full(14, 0.3, np.float32), None, {}))
    call(capsys, *arguments, "--overwrite")
    np.testing.assert_allclose(export.load(output).thresholds, 0.3)
    for name in ("thesis.txt", "assets.extra/tf_serving_warmup_requests"):
        (output / name).write_text("mine")  # put there later
        assert "holds other files too" in call(capsys, *arguments, "--overwrite")
        assert (output / name).read_text() == "mine"
        (output / name).unlink()
    # Another name of it is replaced, and what it names is left alone.
    link = tmp_path / "current"
    link.symlink_to("model")
    for _ in range(2):
        call(capsys, *flags(run, form, link), "--overwrite")
        assert not link.is_symlink() and export.load(link).thresholds.size
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["current", "model", "run"]


@pytest.mark.parametrize("form", EVERY_FORMAT)
@pytest.mark.parametrize("size", [100, 9000])  # of a description, of weights
def test_a_full_disk_is_one_line(form, size, tmp_path, capsys):
    run = save_run(tmp_path / "run", "linear")
    output = Path(outputs_of(form, tmp_path / "model"))
    with small_files(size):
        said = call(capsys, *flags(run, form, output))
    assert said == f"error: {output}: File too large\n"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_one_file_runs_everywhere(tmp_path, capsys):
    run = save_run(tmp_path / "run", "linear")
    call(capsys, *flags(run, "stablehlo", tmp_path / "model"))
    with zipfile.ZipFile(tmp_path / "model") as file:
        exported = jax_export.deserialize(bytearray(file.read("model.jax")))
        assert json.loads(file.read("about.json"))["mljax"]
    assert set(exported.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    assert str(exported.in_avals[-1]) == "uint8[batch,32,32,3]"
    # Both forms of the first convolution: a product for the CPU, and itself.
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text and "stablehlo.case" in text


@pytest.mark.parametrize("head", sorted(HEADS))
def test_any_batch_with_every_head(head):
    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone, config.model.head = "small_resnet", head
    _any_batch(config, 32)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - set(SMALL)))
def test_any_batch_with_every_backbone(backbone):
    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone = backbone
    _any_batch(config, 64)


def _any_batch(config, size):
    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)

    def make():
        rngs = nnx.Rngs(0)
        return build_model(config.model, len(NAMES), angular=True, rngs=rngs)

    graph, state = nnx.split(nnx.eval_shape(make))
    with cpu.portable_forms():
        found = jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, images)
    assert found.shape == (batch, len(NAMES))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"--output": "{tmp}/none/model"}, "no folder"),
        pytest.param({"--output": "/proc/model"}, "be written", marks=needs_proc),
        ({"--format": "onnx", "--output": "{tmp}/model"}, ".onnx"),
        ({"--checkpoint": "{tmp}"}, "no checkpoint"),
        ({"--images": "{tmp}/none"}, "--images"),
        ({"--images": "{tmp}/text.jpg"}, "text.jpg"),
    ],
)
def test_mistakes_are_one_line(change, word, tmp_path, capsys):
    run = save_run(tmp_path / "run", "linear")
    (tmp_path / "text.jpg").write_text("not an image")
    given = {
        "--checkpoint": run,
        "--format": "stablehlo",
        "--output": tmp_path / "model",
    }
    given |= {k: v.format(tmp=tmp_path) for k, v in change.items()}
    arguments = [x for pair in given.items() for x in pair]
    assert word in call(capsys, *arguments)
    assert not (tmp_path / "model").exists()


def test_the_flag_knows_every_format():
    assert tuple(FORMATS) == export._FORMATS


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_file.importlib, "import_module", _missing)
    run = save_run(tmp_path / "run", "linear")
    printed = call(capsys, *flags(run, "onnx", tmp_path / "model.onnx"))
    assert "no onnx" in printed and "pip install" in printed


def _missing(name):
    raise ImportError(f"no {name} here")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06" + bytes(18)])
def test_other_files_are_no_exports(content, tmp_path):
    file = tmp_path / "model"
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a model exported"):
        export.load(file)
    with pytest.raises(UserError, match="none: there is no such file"):
        export.load(tmp_path / "none")


def test_a_damaged_export_is_named(tmp_path):
    file = tmp_path / "model"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("about.json", json.dumps({"format": 1}))
        made.writestr("model.jax", b"half of it")
        made.writestr("weights.safetensors", b"")
    with pytest.raises(UserError, match=f"{file}: is damaged"):
        export.load(file)
