"""ONNX files: what is in them, and what runs them; photos in every format."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from small_networks import SMALL
from test_export import (
    EVERY_FORMAT,
    NAMES,
    call,
    flags,
    needs_onnx,
    outputs_of,
    restored,
    save_run,
    small_networks,  # noqa: F401  (used by every test)
)

from mljax import decision, export
from mljax.errors import UserError
from mljax.formats import FORMATS, onnx_file
from mljax.models import BACKBONES
from mljax.predict import Predictor

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs pip install openvino"
)
ENGINES = [*EVERY_FORMAT, pytest.param("openvino", marks=[needs_onnx, needs_openvino])]


@needs_onnx
def test_an_onnx_graph_is_clean(tmp_path, capsys):
    import onnx

    run = save_run(tmp_path / "run", "linear", "mobilenetv3_large_100", decided=False)
    call(capsys, *flags(run, "onnx", tmp_path / "model.onnx"))
    model = onnx.load(tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    # 15 blocks of a depthwise and two other convolutions (the first block has one),
    # two in each of 8 squeeze-and-excite, stem, last stage, conv_head.
    assert kinds["Conv"] == 3 * 15 - 1 + 2 * 8 + 3
    assert kinds["Transpose"] < 6 and kinds["MatMul"] == 1
    assert kinds["Add"] < 15  # the skips: no bias is left
    assert [(i.domain, i.version) for i in model.opset_import] == [
        ("", onnx_file.OPSET)
    ]
    (images,) = model.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert images.type.tensor_type.shape.dim[0].dim_param


@needs_onnx
def test_mirror_images_need_no_second_copy_of_the_weights(tmp_path, capsys):
    sizes = []
    for flip in (False, True):
        run, output = tmp_path / f"run{flip}", tmp_path / f"{flip}.onnx"
        save_run(run, "linear", "mobilenetv3_large_100", flip=flip)
        call(capsys, *flags(run, "onnx", output))  # refused unless it is the checkpoint
        sizes.append(output.stat().st_size)
    assert sizes[1] < 1.05 * sizes[0]


def in_openvino(path):
    import openvino

    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", hint)


def openvino_predictor(path, batch):
    """A Predictor that runs the file in OpenVINO."""
    compiled = in_openvino(path)
    about = FORMATS["onnx"].read(Path(path))[1]
    decided = decision.from_json(about["decision"], about["class_names"])
    return Predictor(lambda x: compiled({"images": x})[0], about, decided, batch)


@needs_onnx
@needs_openvino
@pytest.mark.parametrize("head", ["linear", "gcn", "ml_decoder"])
def test_openvino(head, tmp_path, capsys):
    run = save_run(tmp_path / "run", head)
    call(capsys, *flags(run, "onnx", tmp_path / "model.onnx"))
    compiled = in_openvino(tmp_path / "model.onnx")
    for batch in (1, 7):
        images = export.samples(32, 32)[:batch]
        p, labels = compiled({"images": images}).values()
        expected = export.load(tmp_path / "model.onnx").predict(images)
        np.testing.assert_allclose(p, expected, rtol=0, atol=1e-5)
        assert labels.shape == p.shape


@needs_onnx
def test_int8(tmp_path, capsys):
    import onnx

    run = save_run(tmp_path / "run", "ml_decoder")
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    call(capsys, *flags(run, "onnx", whole))
    printed = call(capsys, *flags(run, "onnx", small), "--int8", "--data", "val")
    assert "int8: " in printed and "mAP: " in printed
    stored = onnx.load(small).graph.initializer
    eight = [t for t in stored if t.data_type == onnx.TensorProto.INT8]
    numbers = sum(int(np.prod(t.dims)) for t in eight)
    assert numbers > 5000
    kinds = Counter(node.op_type for node in onnx.load(whole).graph.node)
    assert kinds["MatMul"] + kinds["Gemm"] == 6  # of the decoder
    assert kinds["Einsum"] == 3  # attention, and the classifier of each group
    assert small.stat().st_size < whole.stat().st_size - 2 * numbers
    images = export.samples(32, 32)
    one, other = (export.load(p).predict(images) for p in (whole, small))
    assert 0 < np.abs(one - other).max() < 0.02
    assert export.load(small).class_names == NAMES


@needs_onnx
def test_half_of_an_onnx_file_is_named(tmp_path, capsys):
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    call(capsys, *flags(save_run(tmp_path / "run", "linear"), "onnx", whole))
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=f"^{half}: .*cannot read it") as error:
        export.load(half)
    assert "\n" not in str(error.value)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - set(SMALL)))
def test_onnx_with_every_backbone(backbone, tmp_path, capsys):
    size = 224 if backbone.startswith("vit") else 72  # odd maps inside
    run = save_run(tmp_path / "run", "linear", backbone, size, statistics=True)
    output = outputs_of("onnx", tmp_path / "model")
    # It is refused unless it is the checkpoint.
    assert "written: " in call(capsys, *flags(run, "onnx", output))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("head", ["linear", "gcn", "ml_decoder"])
def test_photos(engine, head, tmp_path, capsys):
    """100 photos at batch 1, 7 and 64, MobileNetV3."""
    photos = sorted(shared("data/corel5k/images").rglob("*.jpg"))[:100]
    run = save_run(tmp_path / "run", head, "mobilenetv3_large_100", 128)
    form = "onnx" if engine == "openvino" else engine
    output = outputs_of(form, tmp_path / "model")
    call(capsys, *flags(run, form, output))
    reference = restored(run)
    expected = reference.predict(photos)
    for batch in (1, 7, 64):
        exported = export.load(output, batch_size=batch)
        if engine == "openvino":
            exported = openvino_predictor(output, batch)
        found = exported.predict(photos)
        tolerance = 1e-4 if form == "onnx" else 1e-5
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
