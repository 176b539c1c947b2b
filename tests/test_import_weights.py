"""`python -m mljax.import_weights`: files in, the same start of a run, files out."""

import functools
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, shared
from flax import nnx
from golden_backbones import image
from golden_weights import golden_weights
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file
from test_blocks import TINY
from test_label_graph import some_graph
from test_mobilenetv3 import run

from mljax import checkpoint, import_weights, losses
from mljax.config import common
from mljax.label_graph_data import LabelGraph
from mljax.models import (
    BACKBONES,
    build_model,
    import_torch,
    paper_names,
    pretrained,
    tresnet_abn,
)
from mljax.models.functional import split
from mljax.models.layers import BatchNorm, Conv


class Small(nnx.Module):
    """A network of one layer, with the attributes of a backbone."""

    num_features, head_activation = 12, "relu"

    def __init__(self, hidden, classifier, *, rngs, **options):
        self.conv1 = Conv(3, 12, 3, stride=8, rngs=rngs)
        self.bn1 = BatchNorm(12)
        self.head_hidden, self.classifier = hidden, classifier

    def __call__(self, images, train=False, rngs=None):
        return jax.nn.relu(self.bn1(self.conv1(images), train))


SMALL = {  # as MobileNetV3's and ResNet's last layers
    "small_mobile": functools.partial(Small, 8, "classifier"),
    "small_resnet": functools.partial(Small, 0, "fc"),
}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name, make in (TINY | SMALL).items():
        monkeypatch.setitem(BACKBONES, name, make)
    monkeypatch.setattr(paper_names, "_BACKBONES", tuple(SMALL))


def config_of(backbone: str, head: str, loss: str):
    config = common()
    config.model.backbone, config.model.head, config.loss.name = backbone, head, loss
    config.model.ml_decoder.dim = 16
    return config


def model_of(backbone: str, head: str, loss: str, classes: int, seed: int = 0):
    """A random model; label graphs and classes are of the seed too."""
    graph = None
    if head in ("gcn", "gat"):
        given = some_graph(classes, seed)
        arrays = given["adjacency"], given["embeddings"]
        graph = LabelGraph(list(map(str, range(classes))), *arrays, 0.4, [])
    return build_model(
        config_of(backbone, head, loss).model,
        classes,
        angular=losses.is_angular(loss),
        rngs=nnx.Rngs(seed),
        graph=graph,
    )


def timm_file(folder, backbone: str, classes: int = 10, **more):
    """A file as timm's, and its tensors."""
    state = import_torch.export(model_of(backbone, "linear", "bce", classes, seed=5))
    state = {k: np.array(v, order="C") for k, v in state.items()} | more
    save_file(state, folder / f"{backbone}.safetensors")
    return folder / f"{backbone}.safetensors", state


def call(capsys, *arguments) -> str:
    """Runs the command; what it printed. Errors are one line."""
    code = import_weights.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == (1 if err else 0)
    if err:
        assert err.startswith("error: ") and err.count("\n") == 1
    return err or out


def same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


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


def save_run(folder, backbone: str, head: str, loss: str, classes: int = 7):
    """A work directory as training leaves it."""
    model = model_of(backbone, head, loss, classes, seed=5)
    params, batch_stats = split(model)
    about = {
        "config": config_of(backbone, head, loss).to_dict(),
        "class_names": [f"class {i}" for i in range(classes)],
    }
    saves = checkpoint.Checkpoints(folder / "best")
    saves.save(3, {"params": params, "batch_stats": batch_stats}, about)
    saves.close()
    return model


WHOLE = [
    ("linear", "aam"),
    ("linear", "asl"),
    ("gcn", "aam"),
    ("gcn", "bce"),
    ("gat", "aam"),
    ("ml_decoder", "aam"),
    ("ml_decoder", "asl"),
]


@pytest.mark.parametrize("names", ["timm", "paper"])
@pytest.mark.parametrize("backbone", SMALL)
def test_export_and_import_give_the_same_bits(backbone, names, tmp_path, capsys):
    for head, loss in WHOLE:
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


def test_a_file_without_a_classifier(tmp_path, capsys):
    _, state = timm_file(tmp_path, "vit")
    del state["head.weight"], state["head.bias"]
    save_file(state, tmp_path / "mae.safetensors")
    flags = "--model", "vit", "--to", tmp_path / "dir"
    said = call(capsys, *flags, "--from", tmp_path / "mae.safetensors")
    assert "no classifier" in said
    params, _ = (checkpoint.load_variables(tmp_path / "dir")[0][k] for k in (KEYS))
    assert set(params) == {"backbone"}
    starts = [
        pretrained.load(str(path), lambda: model_of("vit", "linear", "aam", 4))
        for path in (tmp_path / "dir", tmp_path / "mae.safetensors")
    ]
    same(starts[0][:2], starts[1][:2])
    export = "--export", "--from", tmp_path / "dir", "--to", tmp_path / "x.safetensors"
    assert "without a classifier" in call(capsys, *export)


KEYS = ("params", "batch_stats")


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
    assert "none.txt" in says("--classes", tmp_path / "none.txt")
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
        ["--from=a", "--to=b", "--head=csra"],
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
