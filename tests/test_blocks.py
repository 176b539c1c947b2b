"""What all backbones offer: stochastic depth, rematerialisation, dtypes, timm heads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from configs.common import get_config
from mljax import models
from mljax.models import (
    Classifier,
    blocks,
    build_head,
    build_model,
    efficientnetv2,
    import_torch,
    mobilenetv3,
    resnet,
    tresnet,
    vit,
)
from mljax.models.efficientnetv2 import Stage
from mljax.models.functional import functional

EFFICIENT = (Stage("conv", 2, 1, 1, 8), Stage("fused", 2, 2, 4, 8))
EFFICIENT += (Stage("mbconv", 2, 2, 4, 16),)
MOBILE = [[mobilenetv3.BlockSpec(3, s, 16, 16, 8, "hard_swish") for s in (2, 1)]]
TINY = {
    "efficientnetv2": lambda **o: efficientnetv2.EfficientNetV2(EFFICIENT, 8, **o),
    "mobilenetv3": lambda **o: mobilenetv3.MobileNetV3(
        MOBILE, "relu", same=True, eps=1e-3, **o
    ),
    "resnet": lambda **o: resnet.ResNet((2, 1, 1, 1), width=8, **o),
    "tresnet": lambda **o: tresnet.TResNet((2, 1, 1, 1), width=8, **o),
    "vit": lambda **o: vit.VisionTransformer(32, 2, depth=2, image_size=64, **o),
}


IMAGES = np.random.default_rng(0).standard_normal((4, 64, 64, 3)).astype(np.float32)


def functions(name: str, **options):
    """(apply, params, batch_stats) of a tiny network with stochastic depth."""
    apply, init = functional(
        lambda: TINY[name](rngs=nnx.Rngs(0), drop_path=0.5, **options)
    )
    return apply, *init()


def training_step(name: str, remat: bool):
    """Gradients, the map and new statistics of a training pass, in float64.

    Also how many numbers the forward pass keeps for the backward pass.
    """
    apply, params, stats = functions(name, remat=remat, dtype=jnp.float64)
    params, stats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, stats))

    def loss(params):
        y, new = apply(params, stats, IMAGES, train=True, rng=jax.random.key(3))
        wave = jnp.cos(jnp.arange(y.size).reshape(y.shape))
        return jnp.sum(y * wave), (y, new)

    backward = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], params)
    kept = sum(x.size for x in jax.tree.leaves(backward))
    return jax.jit(jax.grad(loss, has_aux=True))(params), kept


@pytest.mark.parametrize("name", TINY)
def test_remat_keeps_less_and_changes_no_number(name):
    # In float64: the gradient of a bias before BatchNorm is 0 but for rounding, which
    # must not be what is compared.
    with jax.enable_x64(True):
        plain, kept = training_step(name, remat=False)
        again, kept_with_remat = training_step(name, remat=True)
    assert kept_with_remat < 0.7 * kept

    def close(one, other):
        scale = np.abs(one).max() + 1e-6
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)

    assert {x.dtype for x in jax.tree.leaves(plain)} == {np.dtype("float64")}
    jax.tree.map(close, plain, again)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16(name):
    apply, params, stats = functions(name, dtype="bfloat16")
    fmap, stats = jax.jit(lambda params: apply(params, stats, IMAGES))(params)
    assert fmap.dtype == jnp.bfloat16 and jnp.isfinite(fmap).all()
    for leaf in jax.tree.leaves((params, stats)):
        assert leaf.dtype == jnp.float32


def test_stochastic_depth():
    x, y = jnp.ones((1000, 2, 2, 3)), jnp.full((1000, 2, 2, 3), 2.0)
    summed = blocks.residual(x, y, 0.25, True, nnx.Rngs(0))
    assert set(np.unique(summed)) == {1, np.float32(1 + 2 / 0.75)}
    per_image = np.asarray(summed).reshape(1000, -1)
    assert (per_image == per_image[:, :1]).all()
    assert abs((per_image[:, 0] == 1).mean() - 0.25) < 0.05
    for same in (
        blocks.residual(x, y, 0.25, False, None),
        blocks.residual(x, y, 0.0, True, None),
    ):
        np.testing.assert_array_equal(same, x + y)
    with pytest.raises(ValueError, match="rngs"):
        blocks.residual(x, y, 0.25, True, None)


def test_rates_grow_with_depth():
    """timm's rules: from 0 to below the rate, or to the rate."""

    def rates(model: nnx.Module) -> list[float]:
        modules = [m for _, m in nnx.iter_modules(model) if hasattr(m, "drop_path")]
        return sorted(m.drop_path for m in modules)

    built = {
        name: rates(make(rngs=nnx.Rngs(0), drop_path=0.6))
        for name, make in TINY.items()
    }
    np.testing.assert_allclose(built["efficientnetv2"], np.arange(6) / 10)
    np.testing.assert_allclose(built["mobilenetv3"], [0.6 / 4, 1.2 / 4])
    np.testing.assert_allclose(built["resnet"], np.linspace(0, 0.6, 5))
    np.testing.assert_allclose(built["tresnet"], np.linspace(0, 0.6, 5))
    np.testing.assert_allclose(built["vit"], [0, 0.6])


def test_config_reaches_the_backbone():
    config = get_config().model
    config.backbone, config.drop_path, config.remat = "resnet50", 0.3, True
    model = nnx.eval_shape(
        lambda: build_model(config, 3, angular=False, rngs=nnx.Rngs(0))
    )
    assert model.backbone.layer4.remat
    assert getattr(model.backbone.layer4, "2").drop_path == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("efficientnetv2", "classifier"),
        ("resnet", "fc"),
        ("tresnet", "head.fc"),
        ("vit", "head"),
    ],
)
def test_whole_networks_have_timms_names(name, classifier):
    def whole(head: str, seed: int) -> Classifier:
        backbone = TINY[name](rngs=nnx.Rngs(seed))
        features = backbone.num_features
        return Classifier(
            backbone, build_head(head, features, 3, rngs=nnx.Rngs(seed + 9))
        )

    model, other = whole("linear", 0), whole("linear", 1)
    state = import_torch.export(model)
    features = model.backbone.num_features
    assert state[f"{classifier}.weight"].shape == (3, features)
    import_torch.load(other, state)
    back = import_torch.export(other)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)
    # Another number of classes, and the cosine classifier, start anew.
    assert len(import_torch.load_pretrained(whole("cosine", 2), state)) == 1
    # The method's PyTorch implementation has its own classifier beside timm's, and
    # with AAM an activation that is not used.
    angular = import_torch.export(whole("cosine", 3))
    assert angular["classifier.weight"].shape == (features, 3)
    if classifier != "classifier":
        angular[f"{classifier}.weight"] = np.zeros((3, features))
        angular[f"{classifier}.bias"] = np.zeros(3)
    angular["act2.weight"] = np.full(1, 0.25)
    import_torch.load(whole("cosine", 4), angular)


@pytest.mark.parametrize("angular", [False, True])
def test_a_part_is_a_file_and_a_line(monkeypatch, angular):
    """Backbone and head as README says how to add them, without any options."""

    class Mine(nnx.Module):
        num_features = 8

        def __init__(self, *, rngs, dtype, drop_path, remat):
            self.conv = nnx.Conv(3, 8, (3, 3), strides=8, dtype=dtype, rngs=rngs)

        def __call__(self, images, train, rngs):
            return self.conv(images)

    class Head(nnx.Module):
        def __init__(self, features, num_classes, *, cosine, dtype, rngs):
            assert cosine == angular
            self.last = nnx.Linear(features, num_classes, dtype=dtype, rngs=rngs)

        def __call__(self, x, train, rngs):
            return self.last(x.mean((1, 2)))

    monkeypatch.setitem(models.BACKBONES, "mine", Mine)
    monkeypatch.setitem(models.HEADS, "mine", Head)
    config = get_config().model
    config.backbone = "mine"
    for head in ("mine", "linear", "ml_decoder", "csra", "gcn"):
        config.head = head
        model = build_model(config, 5, angular=angular, rngs=nnx.Rngs(0))
        assert model(IMAGES, train=False).shape == (4, 5)


def test_the_settings_name_every_backbone_and_head():
    text = (ROOT / "configs/common.py").read_text()
    comments = re.findall(r"((?: +#.*\n)+) +model\.(?:backbone|head) = ", text)
    named = [set(re.findall(r"\w+", comment)) for comment in comments]
    assert set(models.BACKBONES) <= named[0] and set(models.HEADS) <= named[1]
