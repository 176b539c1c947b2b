"""Configs: found, read, overridden, checked. Every mistake is one line.

The settings themselves, with their defaults, are in `configs/common.py`.
"""

import difflib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from mljax.errors import UserError


def config_folder() -> Path:
    """`configs/`: inside the installed package, else beside it in a clone."""
    here = Path(__file__).resolve().parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def common() -> ConfigDict:
    """Every key with its default, locked: a config file starts from this."""
    config = _module(config_folder() / "common.py").get_config()
    return config.lock()


def find(path: str) -> Path:
    """The config file that `path` names: as given, or one that comes with mljax."""
    given = Path(path)
    bundled = config_folder() / given.name
    if given.is_file():
        return given
    if not given.is_absolute() and given.parent.name == "configs" and bundled.is_file():
        return bundled
    known = ", ".join(sorted(f"configs/{p.name}" for p in config_folder().glob("*.py")))
    raise UserError(f"--config {path}: there is no such file; mljax has {known}")


def load(path: str, arg: str = "") -> ConfigDict:
    """Runs `get_config(arg)` of the file `path` and checks its keys against common.

    Raises:
        UserError: the file is missing, is not Python, has no `get_config`, or sets a
            key that does not exist.
    """
    file = find(path)
    try:
        module = _module(file)
        config = module.get_config(arg)
    except UserError:
        raise
    except Exception as error:  # a user's file can fail in any way
        raise UserError(f"--config {file}: {_one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {file}: get_config must return a ConfigDict")
    expected, got = flatten(common()), flatten(config)
    for key in got.keys() - expected.keys():
        raise UserError(f"--config {file}: {_unknown(key, expected)}")
    for key in expected.keys() - got.keys():
        raise UserError(
            f"--config {file}: key {key} is missing; start from mljax.config.common()"
        )
    return config.lock()


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `key` ("optim.lr") from its command-line form, keeping the key's type."""
    known = flatten(config)
    if key not in known:
        raise UserError(f"--config.{key}={text}: {_unknown(key, known)}")
    kind = type(known[key])
    try:
        value = _parse(kind, text)
    except ValueError:
        raise UserError(
            f"--config.{key}={text}: must be {_KINDS[kind]}, like {known[key]!r}"
        ) from None
    node = config
    *parents, name = key.split(".")
    for parent in parents:
        node = node[parent]
    node[name] = value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def from_dict(tree: Mapping[str, Any]) -> ConfigDict:
    """A config stored as JSON, over today's defaults for keys it does not have."""
    config = common()
    known = flatten(config)
    for key, value in flatten(tree).items():
        if key in known:
            override(
                config, key, value if isinstance(value, str) else json.dumps(value)
            )
    return config


def validate(config: ConfigDict) -> None:
    """Raises UserError at the first value that can never work, naming its key."""
    flat = flatten(config)
    for key, (test, must) in _RULES.items():
        if not test(flat[key]):
            raise UserError(f"config.{key} = {flat[key]!r}: must be {must}")
    parts = config.optim.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size = {config.batch_size}: must be divisible by "
            f"config.optim.accumulate = {parts}"
        )
    for head in ("ml_decoder", "query2label"):
        dim, heads = config.model[head].dim, config.model[head].heads
        if dim % heads:
            raise UserError(
                f"config.model.{head}.dim = {dim}: must be divisible by "
                f"config.model.{head}.heads = {heads}"
            )
    if config.model.head in ("ml_decoder", "query2label", "csra"):
        # These heads do not pool, and have a dropout of their own.
        defaults = common().model
        for key in ("pool", "dropout"):
            if config.model[key] != defaults[key]:
                raise UserError(
                    f"config.model.{key} = {config.model[key]!r}: does nothing with "
                    f"config.model.head = {config.model.head!r}; leave it at "
                    f"{defaults[key]!r} (the head's own settings: "
                    f"config.model.{config.model.head})"
                )
    if config.optim.freeze_epochs >= config.epochs:
        raise UserError(
            f"config.optim.freeze_epochs = {config.optim.freeze_epochs}: must be below "
            f"config.epochs = {config.epochs} (0 freezes for the whole run)"
        )
    _refuse_idle(config, flat)
    if config.data.name == "annotations" and not config.data.root:
        raise UserError(
            f"config.data.root is empty: name the folder that holds {config.data.train}"
            f" and {config.data.val} (--config.data.root=FOLDER)"
        )
    if config.data.name == "tfds" and not config.data.tfds_name:
        raise UserError('config.data.tfds_name is empty: name a builder ("voc/2007")')


def _refuse_idle(config: ConfigDict, flat: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that was changed and would do nothing."""
    data, optim, defaults = config.data, config.optim, flatten(common())
    mixup, cutmix = data.mixup_alpha > 0, data.cutmix_alpha > 0
    either = "config.data.mixup_alpha or config.data.cutmix_alpha above 0"
    for key, acts, needed in (
        ("data.mixup_alpha", config.batch_size > 1, "config.batch_size above 1"),
        ("data.cutmix_alpha", config.batch_size > 1, "config.batch_size above 1"),
        ("data.mixup_prob", mixup or cutmix, either),
        ("data.mixup_switch_prob", mixup and cutmix, either.replace(" or ", " and ")),
        ("optim.freeze_epochs", optim.freeze, "config.optim.freeze"),
        ("optim.freeze_stats", optim.freeze, "config.optim.freeze"),
    ):
        if flat[key] != defaults[key] and not acts:
            raise UserError(
                f"config.{key} = {flat[key]!r}: does nothing without {needed}; leave "
                f"it at {defaults[key]!r}"
            )


def validate_devices(config: ConfigDict, devices: int) -> None:
    """Raises UserError if a batch cannot be split evenly over `devices`."""
    if config.eval.batch_size % devices:
        raise UserError(
            f"config.eval.batch_size = {config.eval.batch_size}: must be divisible by "
            f"the {devices} devices"
        )
    parts = devices * config.optim.accumulate
    if config.batch_size % parts:
        nearest = max(parts, round(config.batch_size / parts) * parts)
        raise UserError(
            f"config.batch_size = {config.batch_size}: must be divisible by {parts} "
            f"({devices} devices x optim.accumulate = {config.optim.accumulate}); "
            f"{nearest} would do"
        )


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mljax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {file}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _one_line(error: Exception) -> str:
    text = " ".join(str(error.args[0] if error.args else error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    near = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near += difflib.get_close_matches(key, known, n=3)
    hint = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
    return f"there is no key {key}{hint or ' (all keys: configs/common.py)'}"


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def _parse(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)


_Rule = tuple[Callable[[Any], bool], str]


def _one_of(*choices: str) -> _Rule:
    return lambda v: v in choices, "one of " + ", ".join(choices)


_POSITIVE: _Rule = (lambda v: 0 < v < math.inf, "above 0")
_AT_LEAST_0: _Rule = (lambda v: 0 <= v < math.inf, "0 or more")
_SHARE: _Rule = (lambda v: 0 <= v <= 1, "between 0 and 1")
_POSITIVE_SHARE: _Rule = (lambda v: 0 < v <= 1, "above 0 and at most 1")
_BELOW_1: _Rule = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_AXIS: _Rule = (lambda v: v == -1 or v > 0, "-1 or above 0")

# Names of backbones, heads, losses and data sets are checked where they are looked up.
_RULES: dict[str, _Rule] = {
    "init_from": (
        lambda v: v[:5] != "hf://" or bool(re.fullmatch(r"hf://[^/]+/[^/]+", v)),
        "a path, or hf://OWNER/NAME like hf://timm/tf_efficientnetv2_s.in21k",
    ),
    "seed": (lambda v: 0 <= v < 2**31, "at least 0 and below 2**31"),
    "epochs": _POSITIVE,
    "batch_size": _POSITIVE,
    "dtype": _one_of("float32", "bfloat16"),
    "published_mAP": (lambda v: v == -1 or 0 <= v <= 100, "0 to 100 (percent), or -1"),
    "data.num_train": _AT_LEAST_0,
    "data.num_val": _AT_LEAST_0,
    "data.image_size": (lambda v: v >= 16, "at least 16 (pixels)"),
    "data.flip": _SHARE,
    "data.mixup_alpha": _AT_LEAST_0,
    "data.cutmix_alpha": _AT_LEAST_0,
    "data.mixup_prob": _POSITIVE_SHARE,
    "data.mixup_switch_prob": _SHARE,
    "data.holdout": _BELOW_1,
    "data.on_error": _one_of("stop", "skip"),
    "data.max_pixels": _POSITIVE,
    "data.prefetch": _POSITIVE,
    "model.pool": _one_of("avg", "max", "avg+max"),
    "model.dropout": _BELOW_1,
    "model.drop_path": _BELOW_1,
    "model.ml_decoder.groups": _AT_LEAST_0,
    "model.ml_decoder.dim": _POSITIVE,
    "model.ml_decoder.heads": _POSITIVE,
    "model.ml_decoder.feedforward": _POSITIVE,
    "model.ml_decoder.dropout": _BELOW_1,
    "model.query2label.dim": (lambda v: v > 0 and v % 4 == 0, "a multiple of 4"),
    "model.query2label.heads": _POSITIVE,
    "model.query2label.feedforward": _POSITIVE,
    "model.query2label.encoder_layers": _AT_LEAST_0,
    "model.query2label.decoder_layers": _POSITIVE,
    "model.query2label.dropout": _BELOW_1,
    "model.csra.heads": (lambda v: v in (1, 2, 4, 6, 8), "one of 1, 2, 4, 6, 8"),
    "model.csra.residual": _AT_LEAST_0,
    "model.graph.tau": _POSITIVE_SHARE,
    "model.graph.rho": _AT_LEAST_0,
    "model.graph.embedding_dim": _POSITIVE,
    "model.graph.embedding_std": _POSITIVE,
    "model.graph.hidden_dim_scale": _POSITIVE,
    "model.graph.attention_dropout": _BELOW_1,
    "loss.reduction": _one_of("sum", "mean"),
    "loss.label_smoothing": _BELOW_1,
    "loss.focal.gamma": _AT_LEAST_0,
    "loss.asl.gamma_neg": _AT_LEAST_0,
    "loss.asl.gamma_pos": _AT_LEAST_0,
    "loss.asl.probability_margin": _BELOW_1,
    "loss.asl.eps": _AT_LEAST_0,
    "loss.aam.scale": _POSITIVE,
    "loss.aam.margin": (lambda v: -1 <= v <= 1, "between -1 and 1"),
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
    "optim.eps": _POSITIVE,
    "optim.bias_lr_factor": _AT_LEAST_0,
    "optim.clip_norm": _AT_LEAST_0,
    "optim.freeze_epochs": _AT_LEAST_0,
    "optim.backbone_lr_factor": _POSITIVE,
    "optim.layer_decay": _POSITIVE_SHARE,
    "optim.accumulate": _POSITIVE,
    "optim.schedule": _one_of("one_cycle", "cosine", "constant"),
    "optim.pct_start": _SHARE,
    "optim.div_factor": _POSITIVE,
    "optim.final_div_factor": _POSITIVE,
    "sam.rho": _AT_LEAST_0,
    "sam.update_stats": _one_of("both", "first"),
    "ema.decay": _BELOW_1,
    "ema.half_life": _AT_LEAST_0,
    "mutual.weight": _AT_LEAST_0,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "train.log_every": _POSITIVE,
    "train.eval_every": _POSITIVE,
    "train.checkpoint_every": _AT_LEAST_0,
    "train.max_bad_steps": _POSITIVE,
    "train.patience": _AT_LEAST_0,
    "train.warmup_epochs": _AT_LEAST_0,
    "eval.batch_size": _POSITIVE,
}
