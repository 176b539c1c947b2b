"""Freezing and learning rates by layer: what the names mean, for every backbone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.common import get_config
from mljax import finetune
from mljax.errors import UserError
from mljax.models import BACKBONES, Classifier, build_backbone, build_head, layers
from mljax.models.batch_norm import BatchNorm
from mljax.models.blocks import Blocks
from mljax.models.functional import functional, split
from mljax.models.layers import Conv

PARAMS = {
    "backbone": {
        "conv1": {"weight": jnp.ones((3, 2))},
        "layer1": {str(i): {"conv": {"weight": jnp.ones((2, 2))}} for i in range(2)},
        "layer10": {"0": {"conv": {"weight": jnp.ones((2, 2))}}},
        "norm": {"bias": jnp.ones(2)},
    },
    "head": {"fc": {"weight": jnp.ones((2, 5)), "bias": jnp.ones(5)}},
}


def flat(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {finetune.path_name(path): x for path, x in leaves}


@pytest.mark.parametrize(
    ("freeze", "names"),
    [
        ("backbone.layer1", ["backbone.layer1."]),
        ("backbone", ["backbone."]),
        (" head.fc.bias ,backbone.layer1.1", ["head.fc.bias", "backbone.layer1.1"]),
    ],
)
def test_a_prefix_names_all_that_is_below_it(freeze, names):
    found = flat(finetune.frozen_parameters(PARAMS, freeze))
    expected = {n: any(n.startswith(p) for p in names) for n in flat(PARAMS)}
    assert found == expected


def test_nothing_is_frozen_by_default():
    assert finetune.frozen_parameters(PARAMS, "") is None
    assert finetune.lr_factors(PARAMS, 1.0, 1.0) is None
    assert finetune.report(PARAMS, get_config().optim) == ""


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("bakbone", "no parameter 'bakbone'; the model has backbone, head"),
        (
            "head,backbone.layer",
            "'backbone.layer'; backbone has conv1, layer1, layer10",
        ),
        ("head.fc.bias.x", "head.fc.bias has no parts"),
        ("backbone,head", "leaves no parameter to be trained"),
    ],
)
def test_a_prefix_of_nothing_is_one_line(freeze, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        finetune.frozen_parameters(PARAMS, freeze)
    assert "config.optim.freeze" in str(error.value) and "\n" not in str(error.value)


def test_learning_rates_of_layers():
    factors = flat(finetune.lr_factors(PARAMS, 0.5, 0.9))
    expected = {
        "backbone.conv1.weight": 0.5 * 0.9**4,
        "backbone.layer1.0.conv.weight": 0.5 * 0.9**3,
        "backbone.layer1.1.conv.weight": 0.5 * 0.9**2,
        "backbone.layer10.0.conv.weight": 0.5 * 0.9,
        "backbone.norm.bias": 0.5,
        "head.fc.weight": 1.0,
        "head.fc.bias": 1.0,
    }
    assert factors == pytest.approx(expected)
    simple = flat(finetune.lr_factors(PARAMS, 0.1, 1.0))
    assert simple == {n: 0.1 if n.startswith("b") else 1.0 for n in expected}
    without_blocks = {"backbone": {"conv": jnp.ones(1)}, "head": jnp.ones(1)}
    assert flat(finetune.lr_factors(without_blocks, 0.1, 1.0))["backbone.conv"] == 0.1
    with pytest.raises(UserError, match=r"layer_decay = 0\.9: .*blocks"):
        finetune.lr_factors(without_blocks, 1.0, 0.9)


@pytest.mark.parametrize("name", BACKBONES)
def test_layer_decay_follows_the_blocks_of_every_backbone(name, monkeypatch):
    # Only names and shapes are needed, and random numbers are slow to trace.
    monkeypatch.setattr(layers, "draw", lambda rngs, _, shape, *__: jnp.zeros(shape))
    model = nnx.eval_shape(lambda: build_backbone(name, rngs=nnx.Rngs(0)))
    blocks = []  # paths in the order in which they run
    for path, row in nnx.iter_modules(model):
        if isinstance(row, Blocks):
            inside = [getattr(row, str(i)) for i in range(row.length)]
            blocks += [
                ".".join(map(str, ("backbone", *path, i)))
                for i, block in enumerate(inside)
                if not isinstance(block, Blocks)
            ]
    blocks.sort(key=lambda text: [int(n) for n in re.findall(r"\d+", text)])
    params = {"backbone": split(model)[0], "head": {"fc": jnp.ones((1, 2))}}
    factors = flat(finetune.lr_factors(params, 1.0, 0.9))
    steps = {n: round(np.log(f) / np.log(0.9)) for n, f in factors.items()}
    assert len(blocks) >= 12
    for i, block in enumerate(blocks):
        found = {s for n, s in steps.items() if n.startswith(block + ".")}
        assert found == {len(blocks) - i}, block
    others = {}
    for parameter, s in steps.items():
        if not any(parameter.startswith(block + ".") for block in blocks):
            part = parameter.replace("body.", "").split(".")[1]
            others.setdefault(s, set()).add(part)
    # A backbone with other names has to be taught to `finetune._STEM`.
    assert set(others) == {0, len(blocks) + 1}
    assert others[0] <= {"conv_head", "bn2", "norm", "fc"}
    stem = {"conv_stem", "conv1", "bn1", "patch_embed", "cls_token", "pos_embed"}
    assert others[len(blocks) + 1] <= stem


def test_the_table_says_what_is_frozen_and_how_fast_the_rest_is():
    config = get_config().optim
    config.freeze = "backbone"
    table = finetune.report(PARAMS, config).splitlines()
    assert [row.split() for row in table[1:]] == [
        ["20", "frozen", "backbone"],
        ["15", "x", "1", "head"],
    ]
    config.update(freeze="backbone.conv1", freeze_epochs=3, layer_decay=0.5)
    table = finetune.report(PARAMS, config)
    assert re.search(r"6  frozen for 3 epochs, then x 0.0625 +backbone.conv1", table)
    assert re.search(r"4  x 0.25 +backbone.layer1.1", table)
    assert re.search(r"17  x 1 +backbone.norm, head", table)
    # Every parameter is in one row.
    counts = [int(row.split()[0]) for row in table.splitlines()[1:]]
    assert sum(counts) == sum(x.size for x in jax.tree.leaves(PARAMS))
    blocks = {str(i): {"weight": jnp.ones(1)} for i in range(50)}
    config.update(freeze="", freeze_epochs=0, layer_decay=0.9)
    deep = {"backbone": {"blocks": blocks}, "head": jnp.ones(1)}
    table = finetune.report(deep, config).splitlines()
    assert len(table) < 25 and any("31 more" in row for row in table)


class TwoNorms(nnx.Module):
    num_features = 4

    def __init__(self, rngs):
        self.conv1 = Conv(3, 4, 3, padding=1, rngs=rngs)
        self.bn1 = BatchNorm(4)
        self.conv2 = Conv(4, 4, 3, padding=1, rngs=rngs)
        self.bn10 = BatchNorm(4)

    def __call__(self, images, train=False, rngs=None):
        x = jax.nn.relu(self.bn1(self.conv1(images), train))
        return self.bn10(self.conv2(x), train)


def test_frozen_batch_norm_uses_its_running_statistics_and_keeps_them():
    def make():
        rngs = nnx.Rngs(0)
        return Classifier(TwoNorms(rngs), build_head("linear", 4, 3, rngs=rngs))

    draw = np.random.default_rng(0)
    images = draw.standard_normal((8, 6, 6, 3)).astype(np.float32)
    apply, init = functional(make)
    params, stats = init()
    stats["backbone"]["bn1"]["running_mean"] += 0.3
    evaluated, _ = apply(params, stats, images)
    trained, moved = apply(params, stats, images, train=True)

    def fixed(freeze):
        return functional(lambda: finetune.fix_batch_norm(make(), freeze))[0]

    outputs, after = fixed("backbone")(params, stats, images, train=True)
    np.testing.assert_allclose(outputs, evaluated, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    # One of the two: only that one stays.
    outputs, after = fixed("backbone.bn1")(params, stats, images, train=True)
    assert not np.allclose(outputs, evaluated) and not np.allclose(outputs, trained)
    for name, stays in (("bn1", True), ("bn10", False)):
        for kind, value in after["backbone"][name].items():
            assert np.array_equal(value, stats["backbone"][name][kind]) == stays
    assert not np.array_equal(
        moved["backbone"]["bn1"]["running_mean"],
        stats["backbone"]["bn1"]["running_mean"],
    )
