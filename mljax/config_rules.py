"""Which values a setting may have; the sources of data that a setting belongs to."""

import math
import re
from collections.abc import Callable
from typing import Any

_PIXELS = 16384  # along a side


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(isinstance(side, int) and 16 <= side <= _PIXELS for side in sides)


Rule = tuple[Callable[[Any], bool], str]


def _is_span(text: str) -> bool:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    return found is not None and 0 < int(found[1]) <= int(found[2])


def _one_of(*choices: str) -> Rule:
    return lambda v: v in choices, "one of " + ", ".join(choices)


def _up_to(largest: int, least: int = 1) -> Rule:
    return lambda v: least <= v <= largest, f"{least} to {largest}"


def rule_of(key: str, value: Any) -> Rule | None:
    """What the value of a key must be, if there is a rule; for all whole numbers there
    is one."""
    rule = RULES.get(key)
    is_huge = isinstance(value, int) and abs(value) >= 2**31
    if is_huge and (rule is None or rule[0](value)):
        return lambda v: False, "between -2147483647 and 2147483647"
    return rule


_LARGEST = 3e38  # a float32
_WIDTH = 65536  # of a layer
_POSITIVE: Rule = (lambda v: 0 < v < _LARGEST, "above 0 and finite")
_AT_LEAST_0: Rule = (lambda v: 0 <= v < _LARGEST, "0 or more, and finite")
_SHARE: Rule = (lambda v: 0 <= v <= 1, "between 0 and 1")
_POSITIVE_SHARE: Rule = (lambda v: 0 < v <= 1, "above 0 and at most 1")
_BELOW_1: Rule = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_AXIS: Rule = (lambda v: v == -1 or v > 0, "-1 or above 0")

FILE_SOURCES = ("annotations", "coco", "voc", "table", "nuswide", "vg500")
_IMAGE_FOLDERS = ("coco", "voc", "table", "nuswide", "vg500")
# Settings of some sources only.
BELONGS_TO = {
    "train_images": _IMAGE_FOLDERS,
    "val_images": _IMAGE_FOLDERS,
    "classes": ("voc", "table", "vg500", "tfds"),
    "difficult": ("voc",),
    "drop_missing": FILE_SOURCES,
    "tfds_name": ("tfds",),
    "tfds_labels": ("tfds",),
}

# The same, of flags: a config that is changed to another source may keep them.
FLAGS_BELONG_TO = {
    "root": (*FILE_SOURCES, "shards", "tfds"),
    "train": (*FILE_SOURCES, "tfds"),  # shards are of the splits that they were made of
    "val": (*FILE_SOURCES, "tfds"),
    "num_train": ("shapes",),
    "num_val": ("shapes",),
}

# Those of mljax, to which others may be added (README, "Add a part").
NAMES = {
    "data.name": (*FILE_SOURCES, "shapes", "shards", "tfds"),
    "model.head": (
        "linear",
        "cosine",
        "gcn",
        "gat",
        "ml_decoder",
        "query2label",
        "csra",
    ),
    "loss.name": ("bce", "focal", "asl", "aam"),
}

SIZES = ("data.image_size",)
_SIZE: Rule = (_is_size, f"16 to {_PIXELS} (pixels), one number or height,width")

# What the sides of a backbone's pictures must be divisible by.
SIDES = {
    **{f"vit_{size}_patch16_224": 16 for size in ("tiny", "small", "base")},
    **dict.fromkeys(("tresnet_m", "tresnet_l", "tresnet_v2_l"), 4),
}

# Names of backbones, heads, losses and data sets are checked where they are looked up.
RULES: dict[str, Rule] = {
    "init_from": (
        lambda v: v[:5] != "hf://" or bool(re.fullmatch(r"hf://[^/]+/[^/]+", v)),
        "a path, or hf://OWNER/NAME like hf://timm/tf_efficientnetv2_s.in21k",
    ),
    "seed": (lambda v: 0 <= v < 2**31, "at least 0 and below 2**31"),
    "epochs": _up_to(1_000_000),
    "batch_size": _up_to(1_000_000),
    "dtype": _one_of("float32", "bfloat16"),
    "published_mAP": (lambda v: v == -1 or 0 <= v <= 100, "0 to 100 (percent), or -1"),
    "profile": (
        lambda v: not v or _is_span(v),
        "the first and the last step, like 20:25",
    ),
    "data.difficult": _one_of("positive", "ignored", "negative"),
    "data.table.empty": _one_of("absent", "unknown"),
    "data.table.separator": (lambda v: bool(v), "a text"),
    "data.table.delimiter": _one_of(",", ";", "tab"),
    "data.expected.labels": _AT_LEAST_0,
    "data.expected.train": _AT_LEAST_0,
    "data.expected.val": _AT_LEAST_0,
    "data.num_train": _up_to(100_000_000, 0),
    "data.num_val": _up_to(100_000_000, 0),
    "data.image_size": _SIZE,
    "data.fit": _one_of("stretch", "letterbox", "crop"),
    "data.resize": _one_of("bilinear", "area"),
    "data.scaled_decode": (
        lambda v: v == 0 or 1 <= v <= 100,
        "0, or 1 or more (up to 100)",
    ),
    "data.resize_on_device": (lambda v: 0 <= v <= 4096, "0 to 4096 (pixels)"),
    "data.sampling": _one_of("uniform", "class_aware"),
    "data.crop_area": _POSITIVE_SHARE,
    "data.crop_ratio": (lambda v: 1 <= v < math.inf, "1 or more"),
    "data.randaugment.n": _up_to(100, 0),
    "data.randaugment.m": (lambda v: 0 <= v <= 9, "0 (drawn) to 9"),
    "data.randaugment.prob": _POSITIVE_SHARE,
    "data.jitter.brightness": _SHARE,
    "data.jitter.contrast": _SHARE,
    "data.jitter.saturation": _SHARE,
    "data.jitter.hue": (lambda v: 0 <= v <= 0.5, "between 0 and 0.5 (turns)"),
    "data.cutout": _SHARE,
    "data.cutout_side": _POSITIVE_SHARE,
    "data.flip": _SHARE,
    "data.mixup_alpha": _AT_LEAST_0,
    "data.cutmix_alpha": _AT_LEAST_0,
    "data.mixup_prob": _POSITIVE_SHARE,
    "data.mixup_switch_prob": _SHARE,
    "data.holdout": _BELOW_1,
    "data.on_error": _one_of("stop", "skip"),
    "data.max_pixels": (lambda v: 0 < v < 2**31, "1 to 2147483647"),
    "data.prefetch": (lambda v: 0 < v <= 1000, "1 to 1000 batches"),
    "data.parallel_reads": _up_to(4096, 0),
    "model.pool": _one_of("avg", "max", "avg+max"),
    "model.dropout": _BELOW_1,
    "model.drop_path": _BELOW_1,
    "model.batch_norm_groups": _POSITIVE,
    "model.ml_decoder.groups": _AT_LEAST_0,
    "model.ml_decoder.dim": _up_to(_WIDTH),
    "model.ml_decoder.heads": _POSITIVE,
    "model.ml_decoder.feedforward": _up_to(_WIDTH),
    "model.ml_decoder.dropout": _BELOW_1,
    "model.query2label.dim": (
        lambda v: 0 < v <= _WIDTH and v % 4 == 0,
        f"a multiple of 4, up to {_WIDTH}",
    ),
    "model.query2label.heads": _POSITIVE,
    "model.query2label.feedforward": _up_to(_WIDTH),
    "model.query2label.encoder_layers": _up_to(100, 0),
    "model.query2label.decoder_layers": _up_to(100),
    "model.query2label.dropout": _BELOW_1,
    "model.csra.heads": (lambda v: v in (1, 2, 4, 6, 8), "one of 1, 2, 4, 6, 8"),
    "model.csra.residual": _AT_LEAST_0,
    "model.graph.tau": _POSITIVE_SHARE,
    "model.graph.rho": _AT_LEAST_0,
    "model.graph.embedding_dim": _up_to(_WIDTH),
    "model.graph.embedding_std": _POSITIVE,
    "model.graph.hidden_dim_scale": (
        lambda v: 0.01 <= v < _LARGEST,
        "0.01 or more",
    ),
    "model.graph.attention_dropout": _BELOW_1,
    "loss.reduction": _one_of("sum", "mean"),
    "loss.label_smoothing": _BELOW_1,
    "loss.focal.gamma": _AT_LEAST_0,
    "loss.asl.gamma_neg": _AT_LEAST_0,
    "loss.asl.gamma_pos": _AT_LEAST_0,
    "loss.asl.probability_margin": _BELOW_1,
    "loss.asl.eps": _BELOW_1,
    "loss.aam.scale": _POSITIVE,
    "loss.aam.margin": _SHARE,
    "loss.aam.k": _SHARE,
    "loss.aam.gamma_neg": _AT_LEAST_0,
    "loss.aam.gamma_pos": _AT_LEAST_0,
    "loss.aam.probability_margin": _BELOW_1,
    "optim.name": _one_of("sgd", "adamw", "lamb"),
    "optim.lr": _POSITIVE,
    "optim.lr_reference_batch": _AT_LEAST_0,
    "optim.weight_decay": _AT_LEAST_0,
    "optim.momentum": _BELOW_1,
    "optim.b1": _BELOW_1,
    "optim.b2": _BELOW_1,
    "optim.eps": (lambda v: 1e-37 < v < _LARGEST, "above 1e-37"),
    "optim.bias_lr_factor": _AT_LEAST_0,
    "optim.clip_norm": _AT_LEAST_0,
    "optim.freeze": (
        lambda v: not v or bool(v.strip(" ,")),
        'prefixes of parameter paths, separated by commas, or ""',
    ),
    "optim.freeze_epochs": _AT_LEAST_0,
    "optim.backbone_lr_factor": _POSITIVE,
    "optim.layer_decay": _POSITIVE_SHARE,
    "optim.accumulate": _POSITIVE,
    "optim.schedule": _one_of("one_cycle", "cosine", "constant"),
    "optim.pct_start": _SHARE,
    "optim.div_factor": _POSITIVE,
    "optim.final_div_factor": _POSITIVE,
    "sam.rho": _AT_LEAST_0,
    "sam.groups": _POSITIVE,
    "sam.update_stats": _one_of("both", "first"),
    "sam.direction": _one_of("gradient", "momentum"),
    "sam.every_steps": _POSITIVE,
    "sam.every_images": _POSITIVE,
    "sam.reuse": _AT_LEAST_0,
    "ema.decay": _BELOW_1,
    "ema.half_life": _AT_LEAST_0,
    "mutual.weight": _AT_LEAST_0,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "hosts.start_timeout": _up_to(1_000_000),
    "hosts.heartbeat_timeout": _up_to(1_000_000, 5),
    "train.log_every": _POSITIVE,
    "train.eval_every": _POSITIVE,
    "train.checkpoint_every": _AT_LEAST_0,
    "train.max_bad_steps": _POSITIVE,
    "train.patience": _AT_LEAST_0,
    "train.warmup_epochs": (lambda v: -1 <= v < _LARGEST, "-1, 0 or more"),
    "eval.batch_size": _up_to(1_000_000),
}
