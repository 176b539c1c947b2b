"""Settings that would do nothing are refused, unless nobody asked for them."""

import pytest

from mljax import config as configs
from mljax import config_rules, find_lr, main
from mljax.data import DATASETS
from mljax.errors import UserError
from mljax.losses import LOSSES
from mljax.models import HEADS
from mljax.run import check_names


def read(*flags: str):
    return main.read_config(main.parse(["--workdir=x", *flags]))


GCN = ["model.head=gcn", "model.graph.embeddings=x.npy"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data.root=photos"], "data.name = annotations or"),
        (["data.val=mine.json"], "data.name = annotations or"),
        (["optim.momentum=0.5"], "cycle_momentum = false"),
        (["optim.b2=0.5"], "optim.name = adamw or lamb"),
        (["optim.name=adamw", "optim.momentum=0.5"], "optim.name = sgd"),
        (["optim.schedule=cosine", "optim.div_factor=2"], "schedule = one_cycle"),
        (["optim.schedule=constant", "optim.pct_start=0.3"], "one_cycle or cosine"),
        (["loss.name=aam", "loss.asl.gamma_neg=2"], "loss.name = asl"),
        (["loss.name=bce", "loss.aam.k=0.5"], "loss.name = aam"),
        (["model.ml_decoder.dim=64"], "model.head = ml_decoder"),
        (["model.head=gcn", "model.graph.attention_dropout=0.2"], "model.head = gat"),
        (["ema.half_life=1000", "ema.decay=0.5"], "ema.half_life = 0"),
        (["train.patience=0", "train.warmup_epochs=2"], "patience above 0"),
        (["model.graph.tau=0.3"], "model.head = gcn or gat"),
        (["model.graph.embeddings=x.txt"], "model.head = gcn or gat"),
        (["model.graph.adjacency=x.npy"], "model.head = gcn or gat"),
        ([*GCN, "model.graph.embedding_dim=9"], "vectors"),
        ([*GCN, "model.graph.embedding_std=9"], "vectors"),
        (["model.query2label.dim=64"], "model.head = query2label"),
        (["model.csra.heads=2"], "model.head = csra"),
        (["loss.name=aam", "loss.aam.probability_margin=0.1"], "a gamma of aam"),
        (["sam.rho=0", "sam.update_stats=first"], "sam.rho above 0"),
    ],
)
def test_what_does_nothing_is_refused(flags, message):
    with pytest.raises(UserError, match=f"does nothing without .*{message}"):
        read("--config=configs/shapes.py", *(f"--config.{flag}" for flag in flags))


def test_the_names_of_mljax_are_known():
    registries = {"data.name": DATASETS, "model.head": HEADS, "loss.name": LOSSES}
    assert config_rules.NAMES.keys() == registries.keys()
    for key, names in config_rules.NAMES.items():
        assert set(names) == set(registries[key])


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("data.name=COCO", "data.root=x"),
        ("model.head=ml_decodr", "model.ml_decoder.dim=64"),
        ("loss.name=als", "loss.asl.gamma_neg=2"),
    ],
)
def test_names_that_are_not_of_mljax_are_judged_later(name, flag):
    """They may be the user's own; if not, `check_names` says it."""
    found = read("--config=configs/shapes.py", *(f"--config.{x}" for x in (name, flag)))
    with pytest.raises(UserError, match="must be one of"):
        check_names(found)


@pytest.mark.parametrize(
    "flags",
    [
        ["model.head=gat", "model.graph.by_occurrences=true"],
        [
            "model.head=gcn",
            "model.graph.embeddings=x.txt",
            "model.graph.embedding_std=9",
        ],
        ["loss.aam.probability_margin=0.1", "loss.aam.gamma_neg=1"],
        ["model.head=gcn", "model.graph.tau=0.3"],
        ["optim.name=adamw", "optim.cycle_momentum=false", "optim.b1=0.5"],
    ],
)
def test_what_acts_is_accepted(flags):
    flags = ["loss.name=aam", "loss.aam.gamma_neg=0", "loss.aam.gamma_pos=0", *flags]
    read("--config=configs/shapes.py", *(f"--config.{flag}" for flag in flags))


@pytest.mark.parametrize("key", ["num_train", "num_val"])
def test_a_part_of_real_data_is_not_promised(key):
    with pytest.raises(UserError, match=r"does nothing without .* = shapes"):
        read(
            "--config=configs/coco.py", "--config.data.root=x", f"--config.data.{key}=9"
        )


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        ("coco.py", "data.resize=area"),
        ("coco.py:tresnet_l,linear,asl", "data.cutout=0"),
        ("corel5k.py", "sam.direction=momentum"),
        ("coco.py:original", "data.name=shards"),
        ("voc.py:tf_efficientnetv2_s,gcn,tfds", "data.name=shards"),
        ("voc.py:tf_efficientnetv2_s,gcn", "model.graph.adjacency=x.npy"),
    ],
)
def test_what_a_recipe_sets_stands_in_no_ones_way(config, flag):
    found = read(
        f"--config=configs/{config}", "--config.data.root=x", f"--config.{flag}"
    )
    configs.validate(found, chosen=())


def test_shards_have_their_splits():
    with pytest.raises(UserError, match=r"data\.val = 'mine\.json': does nothing"):
        read(
            "--config=configs/coco.py",
            "--config.data.name=shards",
            "--config.data.root=x",
            "--config.data.val=mine.json",
        )


def test_a_file_of_ones_own_is_held_to_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from mljax.config import common\n"
        "def get_config(arg=''):\n"
        "    config = common()\n"
        "    config.data.root = 'x'\n"
        "    config.sam.rho, config.sam.every_steps = 0.0, 2\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match="does nothing without .*rho above 0"):
        read(f"--config={file}")
    assert read(f"--config={file}", "--config.sam.rho=0.1").sam.every_steps == 2


@pytest.mark.parametrize(
    ("method", "words"),
    [("range", "no such file"), ("tpe", "does nothing without")],
)
def test_the_range_test_has_no_cycle_that_replaces_the_momentum(
    tmp_path, capsys, method, words
):
    flags = ["--config=configs/coco.py", "--config.optim.momentum=0.85"]
    flags += ["--config.batch_size=80", f"--config.data.root={tmp_path}"]
    flags += [f"--method={method}"]
    assert find_lr.main([*flags, f"--workdir={tmp_path / 'search'}"]) == 1
    assert words in capsys.readouterr().err


def test_a_misspelt_loss_is_not_taken_for_one_with_logits():
    config = configs.load("configs/shapes.py")
    config.model.head, config.loss.name = "cosine", "nosuch"
    configs.validate(config)  # run.check_names says that there is none


def test_blanks_between_the_words_of_a_variant():
    found = read("--config=configs/coco.py: tresnet_l , gcn", "--config.data.root=x")
    assert (found.model.backbone, found.model.head) == ("tresnet_l", "gcn")


def test_the_makers_split_of_nuswide_is_known():
    config = configs.load("configs/nuswide.py", "original")
    assert config.data.expected.to_dict() == {
        "labels": 81,
        "train": 161_789,
        "val": 107_859,
    }
