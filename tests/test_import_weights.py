"""`python -m mljax.import_weights`: files in, the same start of a run, files out."""

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx
from golden_backbones import image
from golden_weights import golden_weights
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file
from small_networks import (
    SMALL,
    call,
    config_of,
    model_of,
    same,
    save_run,
    timm_file,
)
from test_blocks import TINY
from test_mobilenetv3 import run

from mljax import checkpoint, import_weights
from mljax.errors import UserError
from mljax.models import (
    BACKBONES,
    import_torch,
    paper_names,
    pretrained,
    tresnet_abn,
)
from mljax.models.functional import split


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name, make in (TINY | SMALL).items():
        monkeypatch.setitem(BACKBONES, name, make)
    monkeypatch.setattr(paper_names, "_BACKBONES", tuple(SMALL))


RUNS = [  # head, loss, classes of the run
    ("linear", "bce", 10),
    ("linear", "bce", 4),
    ("linear", "aam", 10),
    ("gcn", "aam", 4),
    ("ml_decoder", "asl", 4),
    ("csra", "bce", 4),
]


@pytest.mark.parametrize("backbone", [*SMALL, "vit", "tresnet", "efficientnetv2"])
def test_a_file_and_its_import_start_a_run_alike(backbone, tmp_path, capsys):
    file, state = timm_file(tmp_path, backbone)
    if backbone == "tresnet":  # as its authors trained it, with InPlace-ABN
        original = tresnet_abn.to_original(state)
        save_file(original, file)
        state = state | tresnet_abn.from_original(original)
    flags = "--model", f"{backbone}.in1k", "--from", file, "--to", tmp_path / "dir"
    assert "10 classes, loss bce" in call(capsys, *flags)
    for case in RUNS:

        def make_model(case=case):
            return model_of(backbone, *case)

        *alike, notes = pretrained.load(str(file), make_model)
        *there, other_notes = pretrained.load(str(tmp_path / "dir"), make_model)
        same(alike, there)
        assert len(notes) == len(other_notes)
        assert bool(notes) == (case != RUNS[0])
        # They are the file's weights, and what is left out is the model's own.
        fresh = make_model()
        found, own = (import_torch.export(m) for m in (nnx_merge(fresh, there), fresh))
        inside = import_torch.export(fresh.backbone)
        kept = {n for n in found if n in inside or n.startswith("conv_head.")}
        for name in found:
            expected = state if name in kept or case == RUNS[0] else own
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert ("conv_head.weight" in found) == (
            case[0] == "linear" and backbone == "small_mobile"
        ) or backbone == "efficientnetv2"


def nnx_merge(model, variables):
    graph, *_ = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.merge(graph, *variables)


WHOLE = [
    ("linear", "aam"),
    ("linear", "asl"),
    ("gcn", "aam"),
    ("gcn", "bce"),
    ("gat", "aam"),
    ("ml_decoder", "aam"),
    ("ml_decoder", "asl"),
]


@pytest.mark.parametrize(
    ("names", "backbone"),
    [("paper", "small_mobile"), ("paper", "small_resnet"), ("timm", "small_resnet")],
)
def test_export_and_import_give_the_same_bits(backbone, names, tmp_path, capsys):
    for head, loss in WHOLE if names == "paper" else WHOLE[1:4]:
        folder = tmp_path / f"{head} {loss}"
        model = save_run(folder / "run", backbone, head, loss)
        file, back = folder / "x.safetensors", folder / "dir"
        flags = "--export", "--names", names, "--from", folder / "run", "--to", file
        assert "7 classes" in call(capsys, *flags)
        flags = "--model", backbone, "--from", file, "--to", back, "--head", head
        said = call(capsys, *flags, "--loss", loss)
        assert f"{backbone} + {head}" in said and f"7 classes, loss {loss}" in said
        variables, about = checkpoint.load_variables(back)
        same([variables["params"], variables["batch_stats"]], list(split(model)))
        assert about["class_names"] == [f"class {i}" for i in range(7)]
        # A run of other classes starts alike from all three.
        starts = [
            pretrained.load(
                str(path), lambda h=head, w=loss: model_of(backbone, h, w, 5)
            )[:2]
            for path in (file, back, folder / "run")
        ]
        same(starts[0], starts[1])
        same(starts[0], starts[2])
        assert pretrained.restore(back)[1] == about


@pytest.mark.parametrize(
    ("head", "loss"),
    [("linear", "bce"), ("csra", "aam"), ("ml_decoder", "aam"), ("query2label", "asl")]
    + [("gcn", "aam"), ("gat", "bce")],
)
def test_a_classifier_of_as_many_other_classes_starts_anew(
    head, loss, tmp_path, capsys
):
    model = save_run(tmp_path / "run", "small_resnet", head, loss)  # of class 0 to 6
    file = tmp_path / "x.safetensors"
    call(capsys, "--export", "--from", tmp_path / "run", "--to", file)
    whole = import_torch.export(model)
    fresh = model_of("small_resnet", head, loss, 7)
    own = import_torch.export(fresh)
    whole |= {name: own[name] for name in getattr(model.head, "from_data", ())}
    names = [f"class {i}" for i in range(7)]
    of_classes = {n for n in own if 7 in own[n].shape}
    of_classes -= {"decoder.query_embed.weight"}  # a group's
    for path in (tmp_path / "run", file):

        def start(names, path=path):
            make = partial(model_of, "small_resnet", head, loss, 7)
            params, batch_stats, notes = pretrained.load(str(path), make, names)
            return import_torch.export(nnx_merge(fresh, [params, batch_stats])), notes

        found, notes = start(names)
        assert notes == []
        same(found, whole)
        for others in ([*names[:-1], "another"], names[::-1]):
            found, (note,) = start(others)
            assert "classifier was not loaded" in note and "other classes" in note
            for name in found:
                expected = own if name in of_classes else whole
                np.testing.assert_array_equal(found[name], expected[name], name)


def test_a_tresnet_of_the_paper_keeps_its_slopes(tmp_path, capsys):
    model = model_of("tresnet", "ml_decoder", "aam", 7)
    state = import_torch.export(model)
    slopes = [f"body.layer4.{i}.relu.weight" for i in range(1)]
    assert not {*slopes} & {*state}
    for value, kept in ((0.3, True), (0.0, False)):
        name = f"slope {value}"
        file, to = tmp_path / f"{name}.safetensors", tmp_path / name
        save_file(state | {n: np.full(1, value, np.float32) for n in slopes}, file)
        flags = "--model", "tresnet", "--from", file, "--to", to, "--loss", "aam"
        assert "7 classes" in call(capsys, *flags, "--head", "ml_decoder")
        found, about = pretrained.restore(to)
        assert about["config"]["model"]["prelu"] == kept
        back = import_torch.export(found)
        assert {*slopes} <= {*back} if kept else not {*slopes} & {*back}
        if kept:
            assert back[slopes[0]] == np.float32(value)


def test_classes_that_are_called_by_numbers(tmp_path, capsys):
    """Numbers that nobody gave are no names; the labels of a run may be numbers."""
    numbers = [str(i) for i in range(7)]
    model = model_of("small_resnet", "linear", "bce", 7)
    file, back = tmp_path / "x.safetensors", tmp_path / "back"
    call(capsys, "--export", "--from", tmp_path / "run", "--to", tmp_path / "x.pth")
    config = config_of("small_resnet", "linear", "bce")
    about = dict(config=config.to_dict(), class_names=numbers)
    params, batch_stats = split(model)
    variables = dict(params=params, batch_stats=batch_stats)
    checkpoint.save_variables(tmp_path / "numbered", variables, about)
    checkpoint.save_variables(back, variables, about | {"imported_from": "x.pth"})
    call(capsys, "--export", "--from", back, "--to", file)
    make = partial(model_of, "small_resnet", "linear", "bce", 7)
    for path, is_kept in (("numbered", False), ("back", True), ("x.safetensors", True)):
        *_, notes = pretrained.load(str(tmp_path / path), make, [*"abcdefg"])
        assert is_kept == (notes == [])


@pytest.mark.parametrize(
    ("head", "loss", "changed"),
    [
        ("query2label", "bce", dict(dim=16, feedforward=24, decoder_layers=1)),
        ("query2label", "aam", dict(encoder_layers=0, decoder_layers=3)),
        ("csra", "bce", dict(heads=4)),
        ("csra", "aam", dict(heads=2)),
    ],
)
def test_other_heads_come_back_in_their_size(head, loss, changed, tmp_path, capsys):
    model = save_run(tmp_path / "run", "small_resnet", head, loss, **changed)
    file, to = tmp_path / "x.safetensors", tmp_path / "dir"
    call(capsys, "--export", "--from", tmp_path / "run", "--to", file)
    flags = "--head", head, "--model", "small_resnet", "--from", file, "--to", to
    if head == "csra":
        assert "--loss is missing" in call(capsys, *flags)
    call(capsys, *flags, "--loss", loss)
    variables, about = checkpoint.load_variables(to)
    same([variables["params"], variables["batch_stats"]], list(split(model)))
    assert about["class_names"] == [f"class {i}" for i in range(7)]
    assert pretrained.restore(to)[1] == about


@pytest.mark.parametrize(("head", "loss"), [("gat", "aam"), ("ml_decoder", "aam")])
def test_restored_models_compute_as_saved_ones(head, loss, tmp_path, capsys):
    model = save_run(tmp_path / "run", "small_resnet", head, loss)
    file, to = tmp_path / "x.safetensors", tmp_path / "dir"
    flags = "--names", "paper", "--from", tmp_path / "run", "--to", file
    call(capsys, "--export", *flags)
    flags = "--head", head, "--loss", loss, "--from", file, "--to", to
    call(capsys, "--model", "small_resnet", *flags)
    restored, about = pretrained.restore(to)
    assert about["config"]["model"]["head"] == head
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
    images = jnp.asarray(images, jnp.float32)
    np.testing.assert_array_equal(restored(images), model(images))


def test_the_papers_logits_through_the_command(tmp_path, capsys):
    """Golden: MobileNetV3, AAM, the names of the paper's own checkpoint."""
    golden = np.load(shared("golden/backbones.npz"))
    case = "wrapper/mobilenetv3_large_21k/am_binary/logits"
    model = model_of("mobilenetv3_large_100", "linear", "aam", 20)
    shapes = {k: v.shape for k, v in import_torch.export(model).items()}
    state = golden_weights(shapes, gain=1.75)
    save_file({f"model.{k}": v for k, v in state.items()}, tmp_path / "a.safetensors")
    names = [f"class {i:02d}" for i in range(20)]
    (tmp_path / "val.json").write_text(json.dumps({"classes": names[::-1]}))
    said = call(
        capsys,
        *("--model", "mobilenetv3_large_100.miil_in21k", "--to", tmp_path / "dir"),
        *("--from", tmp_path / "a.safetensors", "--classes", tmp_path / "val.json"),
        *("--config.loss.aam.scale=17", "--config.model.pool=avg"),
    )
    assert "20 classes, loss aam" in said
    restored, about = pretrained.restore(tmp_path / "dir")
    assert about["class_names"] == names  # in the order of the data
    assert about["config"]["loss"]["aam"]["scale"] == 17
    scores, expected = run(restored, image((2, 3, 96, 96), 123)), golden[case]
    atol = 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=atol)


def test_class_names_in_another_order_are_refused(tmp_path):
    file = tmp_path / "val.json"
    file.write_text('{"classes": ["b", "a"], "images": []}')  # sorted when it is read
    assert import_weights._class_names(str(file), None, 2) == ["a", "b"]
    assert import_weights._class_names(str(file), ["a", "b"], 2) == ["a", "b"]
    assert import_weights._class_names(str(file), ["x", "y"], 2) == ["a", "b"]
    with pytest.raises(UserError, match="another order than the weights, where 'b'"):
        import_weights._class_names(str(file), ["b", "a"], 2)


def test_lists_of_class_names_keep_their_order(tmp_path):
    for name, text in (("names.txt", "b\na\n"), ("names.json", '["b", "a"]')):
        (tmp_path / name).write_text(text)
        assert import_weights._class_names(str(tmp_path / name), None, 2) == ["b", "a"]


def test_the_directory_is_plain_orbax(tmp_path, capsys):
    file, state = timm_file(tmp_path, "small_resnet")
    to = tmp_path / "new" / "dir"
    said = call(capsys, "--model", "small_resnet", "--from", file, "--to", to)
    assert f"{len(state)} tensors" in said and str(to) in said
    tree = ocp.load(to)
    weight = tree["params"]["head"]["classifier"]["weight"]
    np.testing.assert_array_equal(weight, state["fc.weight"].T)
    about = ocp.checkpointables_metadata(to).custom_metadata
    assert about["class_names"] == [str(i) for i in range(10)]
    assert about["config"]["model"]["backbone"] == "small_resnet"
    assert about["imported_from"] == "small_resnet.safetensors"


def test_a_file_without_a_classifier(tmp_path, capsys):
    _, state = timm_file(tmp_path, "vit")
    del state["head.weight"], state["head.bias"]
    save_file(state, tmp_path / "mae.safetensors")
    flags = "--model", "vit", "--to", tmp_path / "dir"
    said = call(capsys, *flags, "--from", tmp_path / "mae.safetensors")
    assert "no classifier" in said
    params = checkpoint.load_variables(tmp_path / "dir")[0]["params"]
    assert set(params) == {"backbone"}
    starts = [
        pretrained.load(str(path), lambda: model_of("vit", "linear", "aam", 4))
        for path in (tmp_path / "dir", tmp_path / "mae.safetensors")
    ]
    same(starts[0][:2], starts[1][:2])
    export = "--export", "--from", tmp_path / "dir", "--to", tmp_path / "x.safetensors"
    assert "without a classifier" in call(capsys, *export)


def test_position_embeddings_of_another_size(tmp_path, capsys):
    positions = np.random.default_rng(0).standard_normal((1, 1 + 36, 32))
    file, _ = timm_file(tmp_path, "vit", pos_embed=positions.astype(np.float32))
    said = call(capsys, "--model", "vit", "--from", file, "--to", tmp_path / "dir")
    assert "resized from 36 patches to 16" in said
    starts = [
        pretrained.load(str(path), lambda: model_of("vit", "linear", "bce", 4))
        for path in (tmp_path / "dir", file)
    ]
    same(starts[0][:2], starts[1][:2])
