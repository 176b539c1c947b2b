"""Names of the paper's PyTorch implementation and of timm, complete in both ways."""

import functools
import json

import numpy as np
import pytest
from conftest import shared
from flax import nnx
from golden_backbones import reference
from test_blocks import TINY
from test_label_graph import some_graph

from mljax.errors import UserError
from mljax.models import (
    Classifier,
    build_backbone,
    build_head,
    import_torch,
    layers,
    paper_names,
)
from mljax.models.import_torch import export

IN_PAPER = {  # its name -> ours
    "mobilenetv3_large_21k": "mobilenetv3_large_100",
    "efficientnetv2_s_21k": "tf_efficientnetv2_s",
    "resnet101": "resnet101",
}


@functools.cache
def backbone(name: str) -> nnx.Module:
    """A whole network for its names and shapes: drawing numbers would take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "draw", lambda r, d, shape, s, t: np.zeros([*shape], t))
        return build_backbone(name, rngs=nnx.Rngs(0))


def linear_on(part: nnx.Module, cosine: bool, classes: int = 20) -> Classifier:
    options = dict(
        hidden=part.head_hidden, activation="prelu" if cosine else part.head_activation
    )
    name = "cosine" if cosine else "linear"
    head = build_head(name, part.num_features, classes, rngs=nnx.Rngs(1), **options)
    return Classifier(part, head)


def shapes(tensors) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in tensors.items()}


def to_paper(name: str, model: Classifier) -> dict[str, np.ndarray]:
    return paper_names.to_paper(name, model, export(model.backbone), export(model.head))


@pytest.mark.parametrize("loss", ["am_binary", "asl"])
@pytest.mark.parametrize("name", IN_PAPER)
def test_wrapped_networks_golden(name, loss):
    """Outside the blocks, which are timm's; see `test_timm_golden`."""
    expected = dict(reference("timm0613", f"wrapper/{name}/{loss}")["state_dict"])
    ours = IN_PAPER[name]
    found = to_paper(ours, linear_on(backbone(ours), loss == "am_binary"))
    assert all(key.startswith("model.") for key in found)
    found = {key.removeprefix("model."): value for key, value in found.items()}
    outside = {k: v for k, v in found.items() if not k.startswith(("blocks.", "layer"))}
    assert shapes(outside) == expected
    if name == "resnet101" and loss == "asl":  # one layer under two names
        np.testing.assert_array_equal(found["fc.weight"], found["classifier.weight"])
    assert {value.dtype for value in found.values()} == {
        np.dtype("float32"),
        np.dtype("int64"),
    }


def test_own_tresnet_golden():
    expected = dict(reference("timm0613", "ref_TResNetL")["state_dict"])
    model = linear_on(backbone("tresnet_v2_l"), cosine=False)
    assert shapes(to_paper("tresnet_v2_l", model)) == expected


@pytest.mark.parametrize(
    ("file", "name", "ours"),
    [
        ("timm0613", "mobilenetv3_large_100", "mobilenetv3_large_100"),
        ("timm0613", "tf_efficientnetv2_s", "tf_efficientnetv2_s"),
        ("timm0613", "tv_resnet101", "resnet101"),
        ("timm1019", "tresnet_v2_l", "tresnet_v2_l"),
        ("timm1019", "tresnet_l", "tresnet_l"),
    ],
)
def test_timm_golden(file, name, ours):
    model = linear_on(backbone(ours), cosine=False)
    expected = dict(reference(file, name)["state_dict"])
    assert shapes(export(model)) == expected


def heads(features: int, cosine: bool, classes: int = 7, seed: int = 0):
    """Name -> the paper's heads that look at the map, with random weights."""
    make = functools.partial(build_head, features=features, num_classes=classes)
    rngs = nnx.Rngs(seed)
    graph = some_graph(classes, seed)
    return {
        "gcn": make("gcn", cosine=cosine, rngs=rngs, hidden_dim_scale=2.0, **graph),
        "gat": make("gat", cosine=cosine, rngs=rngs, **graph),
        "ml_decoder": make("ml_decoder", cosine=cosine, rngs=rngs, dim=16, groups=4),
    }


@pytest.mark.parametrize("case", ["gcn", "gan", "mld"])
def test_names_of_heads_are_those_of_the_golden_trajectories(case):
    golden = np.load(shared("golden/optim.npz"))
    prefix = f"e2e_{case}/traj/"
    expected = {n.removeprefix(prefix) for n in golden if n.startswith(prefix)}
    name = {"gan": "gat", "mld": "ml_decoder"}.get(case, case)
    head = heads(960, cosine=True)[name]
    model = Classifier(backbone("mobilenetv3_large_100"), head)
    found = to_paper("mobilenetv3_large_100", model)
    assert {n for n in found if not n.startswith("backbone.")} == {
        n for n in expected if not n.startswith("backbone.")
    }
    timm = shapes(export(model.backbone))
    inside = {
        key.removeprefix("backbone.model."): shape
        for key, shape in shapes(found).items()
        if key.startswith("backbone.")
    }
    assert inside.pop("act2.weight") == [1]
    assert inside.pop("conv_head.weight") == [1280, 960, 1, 1]
    assert inside.pop("conv_head.bias") == [1280]
    if case != "mld":  # which takes timm's classifier away
        assert inside.pop("classifier.weight") == [1280, 7]
    assert inside == timm


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("name", ["mobilenetv3", "efficientnetv2", "resnet"])
def test_round_trip_to_the_same_bits(name, cosine, monkeypatch):
    monkeypatch.setattr(paper_names, "_BACKBONES", (name,))

    def models(seed):
        part = TINY[name](rngs=nnx.Rngs(seed))
        rest = heads(part.num_features, cosine, seed=seed)
        rest["linear"] = linear_on(part, cosine, 7).head
        return {kind: Classifier(part, head) for kind, head in rest.items()}

    for (kind, one), other in zip(models(1).items(), models(2).values(), strict=True):
        there = to_paper(name, one)
        assert paper_names.head_of(paper_names.without_prefixes(there)) == kind
        wrapped = {f"module.{key}": value for key, value in there.items()}
        notes = import_torch.load(other, wrapped)
        back, before = export(other), export(one)
        assert back.keys() == before.keys()
        for key, value in before.items():
            np.testing.assert_array_equal(back[key], value, err_msg=f"{kind} {key}")
        unused = [n for n in notes if n.startswith("not used by the head")]
        assert len(unused) == (
            kind != "linear"
            and (cosine or name != "efficientnetv2" or kind != "ml_decoder")
        )


@pytest.mark.parametrize(
    ("cosine", "prelu"), [(True, False), (True, True), (False, False)]
)
def test_tresnet_round_trip(cosine, prelu):
    """Not to the same bits: |w| + 1e-5 is rounded."""
    part = TINY["tresnet"](rngs=nnx.Rngs(1), prelu=prelu)
    model = linear_on(part, cosine, 7)
    there = to_paper("tresnet_v2_l", model)
    assert there["head.fc.weight"].shape == ((32 * 8, 7) if cosine else (7, 32 * 8))
    assert ("body.layer4.0.relu.weight" in there) == cosine
    other = linear_on(TINY["tresnet"](rngs=nnx.Rngs(2), prelu=prelu), cosine, 7)
    assert import_torch.load(other, there) == []
    for key, value in export(model).items():
        np.testing.assert_allclose(export(other)[key], value, rtol=0, atol=2e-5)
    if prelu:
        assert there["body.layer4.0.relu.weight"] == 0.25
        there["body.layer4.0.relu.weight"] = np.full(1, 0.35, np.float32)
        import_torch.load(other, there)
        assert export(other)["body.layer4.0.relu.weight"] == np.float32(0.35)
    elif cosine:  # a slope that was learned is another function
        there["body.layer4.1.relu.weight"] += 0.1
        with pytest.raises(UserError, match=r"unexpected: body.layer4.1.relu.weight$"):
            import_torch.load(other, there)


def test_what_the_paper_does_not_have_is_refused(monkeypatch):
    part = TINY["tresnet"](rngs=nnx.Rngs(1), prelu=True)
    for name, cosine in (("tresnet_v2_l", False), ("tresnet_l", True)):
        monkeypatch.setattr(paper_names, "_BACKBONES", ("tresnet_l", "tresnet_v2_l"))
        with pytest.raises(UserError, match="has no PReLU"):
            to_paper(name, linear_on(part, cosine, 7))
    monkeypatch.undo()
    part = TINY["vit"](rngs=nnx.Rngs(0))
    model = Classifier(part, build_head("csra", 32, 7, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="no backbone vit_small.*resnet101"):
        to_paper("vit_small_patch16_224", model)
    with pytest.raises(UserError, match="no head CSRA"):
        to_paper("resnet101", model)


def test_prefixes_of_wrappers():
    names = ["module.model.a", "_orig_mod.module.backbone.model.b", "nncf_module.A"]
    names += ["backbone.c", "model_x.d", "decoder.layers.0.e"]
    expected = ["a", "b", "A", "c", "model_x.d", "decoder.layers.0.e"]
    found = paper_names.without_prefixes(dict.fromkeys(names, 1))
    assert list(found) == expected
    with pytest.raises(UserError, match="two tensors named a: model.a too"):
        paper_names.without_prefixes({"a": 1, "model.a": 2})


def test_reading_the_sizes_of_a_head():
    assert paper_names.read_head({}) == {"num_classes": 0, "cosine": False}
    found = {
        (name, cosine): paper_names.read_head(export(head))
        for cosine in (True, False)
        for name, head in heads(48, cosine).items()
    }
    for cosine in (True, False):
        sizes = dict(num_classes=7, cosine=cosine, embedding_dim=12)
        assert found["gcn", cosine] == {**sizes, "hidden": 24}
        assert found["gat", cosine] == {**sizes, "hidden": 48}
        assert found["ml_decoder", cosine] == dict(
            num_classes=7, cosine=None, groups=4, dim=16, feedforward=2048
        )
    both = {"fc.weight": np.zeros((9, 5)), "fc.bias": np.zeros(9)}
    assert paper_names.read_head(both) == {"num_classes": 9, "cosine": False}
    both["classifier.weight"] = np.zeros((5, 9))
    assert paper_names.read_head(both) == {"num_classes": 9, "cosine": True}
    assert json.dumps(found["ml_decoder", True])  # plain numbers: they go into a config
