"""Configs: every mistake is one line that names the key."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mljax import config as configs
from mljax import train
from mljax.errors import UserError
from mljax.models import BACKBONES


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optim.lrr", "1", r"no key optim\.lrr; did you mean optim\.lr"),
        ("loss.gamma_neg", "1", r"no key loss\.gamma_neg.*loss\.asl\.gamma_neg"),
        ("optim", "1", r"no key optim\b"),
        ("epochs", "1.5", r"config\.epochs=1\.5: must be a whole number"),
        ("optim.lr", "fast", r"must be a number, like 0\.005"),
        ("data.antialias", "maybe", "must be true or false"),
        ("data.image_size", "big", "must be 16 to 16384 .pixels., one number or"),
    ],
)
def test_bad_override(key, text, message):
    config = configs.common()
    with pytest.raises(UserError, match=message) as error:
        configs.override(config, key, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("loss.asl.gamma_neg", "-1", r"loss\.asl\.gamma_neg = -1\.0: .* 0 or more"),
        ("optim.lr", "nan", r"optim\.lr = nan: must be above 0"),
        ("optim.lr", "inf", "must be above 0"),
        ("epochs", "0", "epochs = 0: must be 1 to 1000000"),
        ("epochs", str(10**12), "must be 1 to 1000000"),
        ("train.log_every", str(10**12), "must be between -2147483647 and 2147483647"),
        ("data.num_val", str(10**23), "num_val = 10+: must be 0 to 100000000"),
        ("data.num_train", str(2 * 10**9), "num_train = 20+: must be 0 to 100000000"),
        ("data.parallel_reads", "1000000", "must be 0 to 4096"),
        ("data.image_size", "100000", r"must be 16 to 16384 \(pixels\)"),
        ("data.image_size", "64,100000", r"must be 16 to 16384 \(pixels\)"),
        ("model.ml_decoder.feedforward", "1000000", "must be 1 to 65536"),
        ("model.query2label.dim", "1000000", "a multiple of 4, up to 65536"),
        ("model.graph.embedding_dim", "1000000", "must be 1 to 65536"),
        ("model.graph.hidden_dim_scale", "1e-30", "must be 0.01 or more"),
        ("eval.batch_size", "2000000", "must be 1 to 1000000"),
        ("hosts.start_timeout", "2000000000", "must be 1 to 1000000"),
        ("optim.freeze", " ,", "prefixes of parameter paths"),
        ("optim.accumulate", "5", "batch_size = 84: must be divisible by"),
        ("data.flip", "1.5", "must be between 0 and 1"),
        ("optim.name", "sdg", "must be one of sgd, adamw, lamb"),
        ("data.on_error", "ignore", "must be one of stop, skip"),
        ("data.image_size", "15", r"= 15: must be 16 to 16384 \(pixels\)"),
        ("data.image_size", "320,4", r"= \(320, 4\): .* one number or height,width"),
        ("data.image_size", "32,32,3", r"one number or height,width"),
        ("data.fit", "pad", "must be one of stretch, letterbox, crop"),
        ("data.resize", "nearest", "must be one of bilinear, area"),
        ("data.scaled_decode", "0.5", "must be 0, or 1 or more"),
        ("data.randaugment.m", "10", "must be 0 .drawn. to 9"),
        ("data.crop_area", "0", "must be above 0 and at most 1"),
        ("data.jitter.hue", "0.6", "must be between 0 and 0.5"),
        ("data.mixup_alpha", "-1", "must be 0 or more"),
        ("data.mixup_prob", "0", "must be above 0 and at most 1"),
        ("optim.layer_decay", "1.1", "must be above 0 and at most 1"),
        ("optim.backbone_lr_factor", "0", "must be above 0"),
        ("optim.freeze_epochs", "60", r"must be below config\.epochs = 60"),
        ("published_mAP", "101", "must be 0 to 100"),
    ],
)
def test_bad_value(key, text, message):
    config = configs.common()
    config.data.root = "somewhere"
    configs.validate(config)
    configs.override(config, key, text)
    with pytest.raises(UserError, match=message):
        configs.validate(config)


def test_missing_root_says_what_to_do():
    with pytest.raises(UserError, match=r"config\.data\.root is empty.*train\.json"):
        configs.validate(configs.common())


def test_batch_must_divide_over_devices():
    config = configs.common()
    with pytest.raises(UserError, match=r"batch_size = 84.*by 8.*\b(80|88)\b"):
        configs.validate_devices(config, 8)
    config.batch_size = 80
    configs.validate_devices(config, 8)


def test_evaluation_takes_any_number_of_devices():
    config = configs.common()
    assert config.eval.batch_size == 128
    configs.validate_devices(config, 3)
    assert [configs.round_up(128, n) for n in (1, 3, 8, 129)] == [128, 129, 128, 129]


def test_a_run_can_be_evaluated_on_other_devices():
    config = configs.load("configs/shapes.py")
    config.batch_size, config.eval.batch_size, config.optim.accumulate = 64, 50, 4
    config.sam.every_images = config.sam.groups = config.model.batch_norm_groups = 2
    config.mesh.data, config.mesh.fsdp = 2, 4
    configs.fit_devices(config, 3)
    configs.validate(config)
    configs.validate_devices(config, 3)
    assert config.eval.batch_size == 51


@pytest.mark.parametrize("head", ["ml_decoder", "query2label", "csra"])
@pytest.mark.parametrize(("key", "text"), [("pool", "max"), ("dropout", "0.5")])
def test_settings_that_a_head_ignores_are_refused(head, key, text):
    config = configs.common()
    config.data.root = "somewhere"
    config.model.head = head
    configs.validate(config)
    configs.override(config, f"model.{key}", text)
    with pytest.raises(UserError, match=rf"model\.{key} = .* does nothing with"):
        configs.validate(config)


@pytest.mark.parametrize(
    ("key", "text", "needed"),
    [
        ("data.mixup_prob", "0.5", ["data.mixup_alpha"]),
        ("data.mixup_switch_prob", "0", ["data.mixup_alpha", "data.cutmix_alpha"]),
        ("optim.freeze_epochs", "2", ["optim.freeze"]),
        ("optim.freeze_stats", "false", ["optim.freeze"]),
        ("data.randaugment.m", "3", ["data.randaugment.n"]),
        ("data.randaugment.prob", "1", ["data.randaugment.n"]),
        ("data.cutout_side", "0.2", ["data.cutout"]),
    ],
)
def test_settings_that_do_nothing_alone_are_refused(key, text, needed):
    config = configs.common()
    config.data.root = "somewhere"
    configs.override(config, key, text)
    message = rf"{key} = .*: does nothing without .*{needed[0]}"
    with pytest.raises(UserError, match=message):
        configs.validate(config)
    for other in needed:
        configs.override(config, other, "1")
    configs.validate(config)


@pytest.mark.parametrize(
    ("key", "text", "other", "acts"),
    [
        ("sam.adaptive", "true", "sam.rho", "0.05"),
        ("optim.nesterov", "true", "optim.name", "sgd"),
    ],
)
def test_settings_of_the_optimiser_that_do_nothing(key, text, other, acts):
    config = configs.common()
    config.data.root, config.sam.rho, config.optim.name = "somewhere", 0.0, "adamw"
    configs.override(config, key, text)
    with pytest.raises(UserError, match=f"{key} = .*: does nothing without"):
        configs.validate(config)
    configs.override(config, other, acts)
    configs.validate(config)


def test_settings_of_the_crop_and_the_resize_that_do_nothing():
    for key, text, needed in (
        ("crop_ratio", "2", "crop_area below 1"),
        ("antialias", "false", "resize = bilinear"),
    ):
        config = configs.common()
        config.data.root, config.data.resize = "somewhere", "area"
        configs.validate(config)
        configs.override(config, f"data.{key}", text)
        with pytest.raises(UserError, match=f"does nothing without .*{needed}"):
            configs.validate(config)


def test_image_size_is_one_number_or_two():
    config = configs.common()
    config.data.root = "somewhere"
    for text, size in (("96", 96), ("96,128", (96, 128)), ("(128, 96)", (128, 96))):
        configs.override(config, "data.image_size", text)
        assert config.data.image_size == size
        configs.validate(config)
        stored = json.loads(json.dumps(config.to_dict()))
        assert configs.from_dict(stored).to_dict() == config.to_dict()
    config = configs.common()
    config.data.image_size = (96, 128)  # in a config file
    config.data.image_size = 64
    with pytest.raises(UserError, match="one number or height,width"):
        configs.override(config, "data.image_size", "1.5")


def test_a_cosine_head_needs_aam():
    config = configs.common()
    config.data.root = "somewhere"
    config.model.head = "cosine"
    configs.validate(config)
    config.loss.name = "asl"
    with pytest.raises(UserError, match=r"head = 'cosine'.*'asl' takes logits; choose"):
        configs.validate(config)


def test_one_image_cannot_be_mixed():
    config = configs.common()
    config.data.root = "somewhere"
    config.batch_size, config.data.cutmix_alpha = 1, 1.0
    with pytest.raises(UserError, match=r"cutmix_alpha .*batch_size above 1"):
        configs.validate(config)


def test_overrides_keep_their_type_and_survive_json():
    config = configs.common()
    configs.override(config, "optim.lr", "1")
    configs.override(config, "data.antialias", "False")
    configs.override(config, "init_from", "a b.safetensors")
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    stored = json.loads(json.dumps(config.to_dict()))
    assert configs.from_dict(stored).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(arg=''", "SyntaxError"),
        ("x = 1", "get_config"),
        (
            "from mljax.config import common\n"
            "def get_config(arg=''):\n    c = common()\n    c.optim.lrr = 1",
            "lrr",
        ),
        (
            "from mljax.config import common\n"
            "def get_config(arg=''):\n    c = common()\n    c.epochs = '3'",
            "epochs",
        ),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(arg=''):\n    return ConfigDict({'epochs': 1})",
            "missing",
        ),
        ("def get_config(arg=''):\n    return {}", "ConfigDict"),
        (
            "from mljax.config import common\n"
            "def get_config(arg=''):\n    c = common()\n    c.optim.lr = None\n"
            "    return c",
            "optim.lr is None, and must be a number",
        ),
    ],
)
def test_bad_config_file(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        configs.load(str(file))
    assert "\n" not in str(error.value) and "mine.py" in str(error.value)


def test_missing_config_file_lists_what_there_is():
    with pytest.raises(UserError, match=r"nope\.py.*configs/shapes\.py"):
        configs.load("nope.py")


@pytest.mark.parametrize(
    "backbone", [name for name in BACKBONES if name.startswith(("vit_", "tresnet_"))]
)
def test_sides_that_a_backbone_does_not_take(backbone):
    unit = {"v": 16, "t": 4}[backbone[0]]
    for size in 96 + unit // 2, (96, 96 + unit // 2):
        config = configs.load("configs/shapes.py")
        config.model.backbone = backbone
        with config.data.ignore_type():
            config.data.image_size = size
        with pytest.raises(UserError, match=f"image_size.*divisible by {unit} for"):
            configs.validate(config)
        height, width = (size, size) if isinstance(size, int) else size
        images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        model = nnx.eval_shape(lambda: BACKBONES[backbone](rngs=nnx.Rngs(0)))
        with pytest.raises(UserError, match=f"divisible by {unit}"):
            nnx.eval_shape(lambda m, x: m(x), model, images)


def test_a_batch_that_devices_cannot_share_is_told_before_the_data_is_read(tmp_path):
    config = configs.load("configs/coco.py")
    config.data.root = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="batch_size = 84: must be divisible by 8"):
        train.train(config, str(tmp_path / "run"))
