"""The published recipes (arXiv 2209.06585): what the configs of the data sets share.

A variant is a list of words, such as `tf_efficientnetv2_s,ml_decoder,tfds`: a backbone,
a head, a loss (aam unless named), an image size for which a figure is published, and
where the images come from ("original": the files as the makers of the data set publish
them).

asl is what the paper compares itself with, a linear head or ML-Decoder trained as in
the code that goes with arXiv 2111.12933 (ML-Decoder; that of 2009.14119, ASL, is the
same but for the batch and the length). What differs: decay is decoupled, pixels are
scaled as for aam, to [-1, 1] where theirs are in [0, 1], and Cutout comes after
RandAugment.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mljax.config import common

BACKBONES = (
    "mobilenetv3_large_100",
    "tf_efficientnetv2_s",
    "tf_efficientnetv2_m",
    "tf_efficientnetv2_l",
    "tresnet_l",
    "tresnet_v2_l",
    "resnet101",
)
_SIZE = 448  # pixels, unless a figure is published for another size


class Settings(NamedTuple):
    """What the paper sets by head."""

    lr: float
    scale: float  # of the loss aam
    ema_decay: float


# The learning rates are published for these heads, the scales for a graph on VOC and
# for ML-Decoder on COCO. Which decay goes with which head is not: both are taken in the
# order in which the paper's settings are listed.
_GRAPH = Settings(lr=0.005, scale=17.0, ema_decay=0.9993)
_ML_DECODER = Settings(lr=0.007, scale=23.0, ema_decay=0.9997)
HEADS = {
    "linear": _GRAPH,  # not published: its classifier is that of a graph head
    "gcn": _GRAPH,
    "gat": _GRAPH,
    "ml_decoder": _ML_DECODER,
    "query2label": _ML_DECODER,  # not published with aam: the other transformer
    "csra": _GRAPH,  # not published with aam: a linear classifier
}


class Counts(NamedTuple):
    """How large a data set is known to be; 0 images = not known."""

    labels: int
    train: int
    val: int


class Tfds(NamedTuple):
    """A data set of TensorFlow Datasets and its splits."""

    name: str
    train: str
    val: str


def _aam(config: ConfigDict) -> None:
    settings = HEADS[config.model.head]
    config.optim.lr = settings.lr
    config.loss.aam.scale = settings.scale
    config.ema.decay = settings.ema_decay


def _asl(config: ConfigDict) -> None:
    config.epochs = 40
    config.batch_size = 56
    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.weight_decay = 1e-4
    config.optim.b2 = 0.999
    config.optim.bias_lr_factor = 1.0
    config.optim.div_factor = 25.0
    config.optim.final_div_factor = 1e4
    config.ema.decay = 0.9997
    config.sam.rho = 0.0
    config.train.patience = 0  # all epochs; the best one is kept
    config.loss.asl.weight_gradient = False
    config.data.cutout, config.data.cutout_side = 1.0, 0.5
    config.data.flip = 0.0


LOSSES = {"aam": _aam, "asl": _asl}


def recipe(
    arg: str,
    published: Mapping[str, float],
    counts: Counts,
    tfds: Tfds | None = None,
    original: Mapping[str, Any] | None = None,
    original_counts: Counts | None = None,
) -> ConfigDict:
    """The config of the variant `arg`; loss and head decide the training strategy.

    Args:
        arg: words between commas, in any order: a backbone, a head and a loss (default:
            the first of each), a size that `published` has, "tfds", "debug".
        published: mAP in percent by variant ("tresnet_v2_l,ml_decoder", with ",asl"
            where the loss is not aam and ",640" where the size is not 448).
        counts: of the images of the figures.
        tfds: what "tfds" reads.
        original: what "original" changes in `config.data`.
        original_counts: of the images of "original", where it is another split than
            that of the figures.

    Raises:
        ValueError: a word is unknown or excludes one before it; names the choices.
    """
    words = {word for variant in published for word in variant.split(",")}
    choices: dict[str, list[str]] = {
        "backbone": list(BACKBONES),
        "head": list(HEADS),
        "loss": list(LOSSES),
        "size": sorted(word for word in words if word.isdigit()),
        "source": ["tfds"] * bool(tfds) + ["original"] * bool(original),
        "length": ["debug"],
    }
    kind_of = {word: kind for kind, words in choices.items() for word in words}
    chosen: dict[str, str] = {}
    for word in filter(None, map(str.strip, arg.split(","))):
        if word not in kind_of:
            raise ValueError(f"unknown variant {word!r}; known: {', '.join(kind_of)}")
        kind = kind_of[word]
        if chosen.setdefault(kind, word) != word:
            raise ValueError(f"two of a {kind}, {chosen[kind]} and {word}: name one")

    config = common()
    config.epochs = 60
    config.batch_size = 84
    config.data.image_size = int(chosen.get("size", _SIZE))
    config.data.antialias = False
    config.data.randaugment.n = 2
    config.data.cutout = 0.5
    config.model.backbone = chosen.get("backbone", BACKBONES[0])
    config.model.head = chosen.get("head", next(iter(HEADS)))
    config.loss.name = chosen.get("loss", next(iter(LOSSES)))
    LOSSES[config.loss.name](config)
    aam = config.loss.name == "aam"
    config.model.prelu = aam and config.model.backbone == "tresnet_v2_l"
    config.data.expected.update(counts._asdict())
    variant = [config.model.backbone, config.model.head]
    variant += [config.loss.name] if config.loss.name != "aam" else []
    variant += [chosen["size"]] if "size" in chosen else []
    config.published_mAP = published.get(",".join(variant), -1.0)
    if original and chosen.get("source") == "original":
        config.data.update(original)
        if original_counts:
            config.published_mAP = -1.0
            config.data.expected.update(original_counts._asdict())
    if tfds and chosen.get("source") == "tfds":
        config.data.name = "tfds"
        config.data.tfds_name = tfds.name
        config.data.train, config.data.val = tfds.train, tfds.val
    if "length" in chosen:
        config.epochs = 1
        config.batch_size = 16
        config.data.image_size = 64
        config.published_mAP = 0.0
    return config
