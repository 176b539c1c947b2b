"""The configs that come with mljax: all are valid, and say what was published."""

import re

import numpy as np
import pytest
import source_trees
from conftest import shared
from data_trees import data_config, encode, write_json

from mljax import config as configs
from mljax import models, recipes
from mljax.data import DATASETS, annotations
from mljax.errors import UserError

FILES = sorted(p.stem for p in configs.config_folder().glob("*.py"))
RECIPES = [name for name in FILES if name != "common"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("arg", ["", "debug"])
def test_every_recipe_is_valid(name, arg):
    config = configs.load(f"configs/{name}.py", arg)
    if config.data.name == "annotations":
        config.data.root = "somewhere"
    configs.validate(config)


@pytest.mark.parametrize("name", RECIPES)
def test_unknown_variant_is_named(name):
    with pytest.raises(UserError, match=r"no_such.*debug"):
        configs.load(f"configs/{name}.py", "no_such")


def published(name: str) -> dict[str, float]:
    module = configs._module(configs.config_folder() / f"{name}.py")
    return getattr(module, "PUBLISHED", {})


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("coco", 6, ["640", "tfds", "original"]),
        ("voc", 4, ["tfds", "original"]),
        ("nuswide", 2, ["original"]),
        ("vg500", 0, ["original"]),
    ],
)
def test_published_recipes(name, count, words):
    path, known = f"configs/{name}.py", published(name)
    text = configs.find(path).read_text()
    table = re.findall(r"^\| (\S+) +\| ([\d.]+) ", text, re.MULTILINE)
    assert {variant: float(figure) for variant, figure in table} == known
    assert len(known) == count
    for variant, figure in known.items():
        config = configs.load(path, variant)
        assert config.published_mAP == figure
        backbone, head, *rest = variant.split(",")
        assert (config.model.backbone, config.model.head) == (backbone, head)
        assert config.data.image_size == (640 if "640" in rest else 448)
        assert config.loss.name == ("asl" if "asl" in rest else "aam")
        length = (56, 40) if "asl" in rest else (84, 60)
        assert (config.batch_size, config.epochs) == length
        assert configs.load(path, f"{variant},debug").published_mAP == 0
    for backbone in recipes.BACKBONES:
        for head in recipes.HEADS:
            config = configs.load(path, f"{head},{backbone}")  # in any order
            figure = known.get(f"{backbone},{head}", -1)
            assert config.published_mAP == figure
    with pytest.raises(UserError) as error:
        configs.load(path, "tresnet_v3")
    choices = [*recipes.BACKBONES, *recipes.HEADS, *recipes.LOSSES, *words, "debug"]
    assert str(error.value).endswith(f"known: {', '.join(choices)}")


def test_what_a_head_changes():
    found = {}
    for head in recipes.HEADS:
        c = configs.load("configs/coco.py", head)
        found[head] = c.optim.lr, c.loss.aam.scale, c.ema.decay
    assert found["gcn"] == found["gat"] == found["linear"] == (0.005, 17.0, 0.9993)
    assert found["ml_decoder"] == (0.007, 23.0, 0.9997)
    for name in ("coco", "voc", "nuswide", "vg500"):
        c = configs.load(f"configs/{name}.py", "asl,ml_decoder,debug")
        assert (c.optim.name, c.optim.lr, c.sam.rho) == ("adamw", 1e-4, 0)
        assert not c.loss.asl.weight_gradient and not c.data.flip
        c.data.root = "somewhere"
        configs.validate(c)
    assert set(recipes.BACKBONES) <= models.BACKBONES.keys()
    assert recipes.HEADS.keys() <= models.HEADS.keys()


def test_two_words_of_a_kind_are_refused():
    words = "tresnet_v2_l,ml_decoder,tf_efficientnetv2_s"
    with pytest.raises(UserError, match="two of a backbone, tresnet_v2_l and tf_eff"):
        configs.load("configs/coco.py", words)


@pytest.mark.parametrize(("name", "builder"), [("coco", "coco/2014"), ("voc", "voc/2")])
def test_tfds_variants(name, builder):
    config = configs.load(f"configs/{name}.py", "tfds,gcn")
    configs.validate(config)
    assert config.data.name == "tfds" and builder in config.data.tfds_name
    assert not config.model.graph.by_occurrences  # which needs annotation files


def test_the_graph_of_voc_is_counted_by_objects():
    for arg in ("gcn", "gcn,original"):
        assert configs.load("configs/voc.py", arg).model.graph.by_occurrences
    assert not configs.load("configs/voc.py", "ml_decoder").model.graph.by_occurrences


@pytest.mark.parametrize(
    ("name", "folder", "images", "classes"),
    [("nuswide", "NUS_WIDE", 50_720, 81), ("vg500", "VG500", 10_000, 500)],
)
def test_recipes_read_the_published_files(name, folder, images, classes):
    data = configs.load(f"configs/{name}.py").data
    file = shared(f"reference/annotations/{folder}") / data.val
    # There are no images beside them.
    source = annotations.read(file, "val", data.max_pixels, missing="keep")
    assert source.labels.shape == (images, classes)
    assert (data.expected.labels, data.expected.val) == (classes, images)


def test_a_data_set_that_is_not_complete_is_told(tmp_path):
    """But not another one, with other labels."""
    photos = [["1.png", ["a"]], ["2.png", ["b"]], ["3.png", []]]
    for path, _ in photos:
        (tmp_path / path).write_bytes(encode(np.zeros((4, 4, 3), np.uint8), "PNG"))
    write_json(tmp_path / "train.json", ["a", "b"], photos)
    write_json(tmp_path / "val.json", ["a", "b"], photos[:2])
    data = data_config(tmp_path)
    for labels, train, val in ((0, 0, 0), (2, 3, 2), (2, 0, 0), (3, 9, 9)):
        data.expected.update(labels=labels, train=train, val=val)
        found = DATASETS["annotations"](data, 0)
        assert not found.train.notes and not found.val.notes
    data.expected.update(labels=2, train=1_000, val=2)
    found = DATASETS["annotations"](data, 0)
    assert not found.val.notes
    assert found.train.notes == (
        "3 images, not the 1,000 of the published data with 2 labels "
        "(data.expected.train)",
    )


@pytest.mark.parametrize("name", ["coco", "voc", "nuswide", "vg500"])
def test_recipes_read_the_original_layout(name, tmp_path):
    config = configs.load(f"configs/{name}.py", "original,debug")
    written = source_trees.write(name, tmp_path)
    assert config.data.name == name
    config.data.root = str(tmp_path)
    if name == "voc":  # the tree of the tests has other names for its image sets
        assert (config.data.train, config.data.val) == ("trainval", "test")
        config.data.train, config.data.val = written.train, written.val
    configs.validate(config)
    train = DATASETS[name](config.data, config.seed).train
    assert len(train) == 6 - (name == "coco")  # where it leaves out the unlabelled
    assert train.labels.sum() == source_trees.TRAIN.sum()


def test_no_recipe_names_a_path():
    for name in RECIPES:
        config = configs.load(f"configs/{name}.py")
        assert config.data.root == "" and config.init_from == ""


def test_recipes_augment_as_published():
    for name in ("coco", "voc", "nuswide", "vg500"):
        data = configs.load(f"configs/{name}.py").data
        assert data.randaugment.to_dict() == {"n": 2, "m": 0, "prob": 0.5}
        assert (data.cutout, data.cutout_side, data.flip) == (0.5, 0.4, 0.5)
    for name in ("corel5k", "shapes"):
        data = configs.load(f"configs/{name}.py").data
        assert not data.randaugment.n and not data.cutout
    plain = configs.load("configs/corel5k.py", "plain")
    assert plain.data.crop_area == 1 and plain.sam.update_stats == "both"
    assert not plain.eval.flip
    momentum = configs.load("configs/corel5k.py", "momentum")
    momentum.data.root = "somewhere"
    configs.validate(momentum)
    assert (momentum.sam.direction, momentum.epochs) == ("momentum", 16)
    crops = configs.load("configs/corel5k.py", "crops")
    differs = {"crop_area": crops.data.crop_area}
    assert differs == {"crop_area": 0.6} and crops.eval.flip
    crops.data.crop_area = 1.0
    assert crops.to_dict() == configs.load("configs/corel5k.py").to_dict()
