"""Configs: found, read, overridden, checked. Every mistake is one line.

The settings themselves, with their defaults, are in `configs/common.py`.
"""

import difflib
import importlib.util
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from mljax import config_idle
from mljax.config_rules import FILE_SOURCES, RULES, SIDES, SIZES, rule_of
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
    for key, value in got.items():
        if value is None:  # which ConfigDict takes for a value of any kind
            kind, default = _KINDS[type(expected[key])], expected[key]
            raise UserError(
                f"--config {file}: {key} is None, and must be {kind}, like {default!r}"
            )
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
        value = _parse_size(text) if key in SIZES else _parse(kind, text)
    except ValueError:
        must = RULES[key][1] if key in SIZES else f"{_KINDS[kind]}, like {known[key]!r}"
        raise UserError(f"--config.{key}={text}: must be {must}") from None
    node = config
    *parents, name = key.split(".")
    for parent in parents:
        node = node[parent]
    with node.ignore_type():  # a size is a number or two
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


def validate(config: ConfigDict, chosen: Collection[str] | None = None) -> None:
    """Raises UserError at the first value that can never work, naming its key.

    chosen: the keys that are refused where they do nothing, see `config_idle.found`.
    """
    flat = flatten(config)
    for key, value in flat.items():
        rule = rule_of(key, value)
        if rule and not rule[0](value):
            raise UserError(f"config.{key} = {value!r}: must be {rule[1]}")
    size, unit = config.data.image_size, SIDES.get(config.model.backbone, 1)
    if any(side % unit for side in (size if isinstance(size, tuple) else (size,))):
        raise UserError(
            f"config.data.image_size = {size}: must be divisible by {unit} for "
            f"{config.model.backbone}"
        )
    parts = config.optim.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size = {config.batch_size}: must be divisible by "
            f"config.optim.accumulate = {parts}"
        )
    norm_groups, sam_groups = config.model.batch_norm_groups, config.sam.groups
    if config.batch_size // parts % norm_groups:
        raise UserError(
            f"config.model.batch_norm_groups = {norm_groups}: must divide the "
            f"{config.batch_size // parts} images that are run at once "
            "(config.batch_size / config.optim.accumulate)"
        )
    if norm_groups % sam_groups:
        raise UserError(
            f"config.sam.groups = {sam_groups}: must divide "
            f"config.model.batch_norm_groups = {norm_groups} (images of two groups see "
            "different weights, and cannot be normalised together)"
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
    if config.model.head == "cosine" and config.loss.name in ("bce", "focal", "asl"):
        raise UserError(
            "config.model.head = 'cosine': gives cosines, and config.loss.name = "
            f"{config.loss.name!r} takes logits; choose linear, or the loss aam"
        )
    if config.optim.freeze_epochs >= config.epochs:
        raise UserError(
            f"config.optim.freeze_epochs = {config.optim.freeze_epochs}: must be below "
            f"config.epochs = {config.epochs} (0 freezes for the whole run)"
        )
    defaults = flatten(common())
    idle = config_idle.found(config, flat, defaults, chosen)
    for key, needed in idle.items():
        raise UserError(
            f"config.{key} = {flat[key]!r}: does nothing without {needed}; leave it out"
        )
    _validate_sam(config)
    _validate_data(config.data)


def _validate_sam(config: ConfigDict) -> None:
    """Raises UserError where a cheaper form of SAM lacks what it needs."""
    sam, optim = config.sam, config.optim
    key = "momentum" if optim.name == "sgd" else "b1"
    cycles = optim.schedule == "one_cycle" and optim.cycle_momentum
    if sam.direction == "momentum" and not optim[key] and not cycles:
        raise UserError(
            "config.sam.direction = 'momentum': the optimiser has none; set "
            f"config.optim.{key} above 0 (or leave config.sam.direction at 'gradient')"
        )
    if sam.every_images == 1:
        return
    if sam.every_steps > 1 and sam.reuse:
        raise UserError(
            f"config.sam.every_images = {sam.every_images}: does not go with "
            f"config.sam.every_steps = {sam.every_steps}, whose other steps use again "
            "what all images gave; set one of the two to 1, or config.sam.reuse=0"
        )
    parts = _first_pass_parts(config)
    at_once = parts * config.model.batch_norm_groups
    if config.batch_size % at_once:
        raise UserError(
            f"config.sam.every_images = {sam.every_images}: config.batch_size = "
            f"{config.batch_size} must be divisible by {at_once} (every_images, times "
            "the parts in which config.optim.accumulate and "
            "config.model.batch_norm_groups run the first pass)"
        )


def _first_pass_parts(config: ConfigDict) -> int:
    """The batch over the images that SAM's first pass runs at once."""
    every = config.sam.every_images
    return every * math.ceil(config.optim.accumulate / every)


def _validate_data(data: ConfigDict) -> None:
    """Raises UserError where a source lacks what it needs."""
    if data.name in FILE_SOURCES and not data.root:
        raise UserError(
            f"config.data.root is empty: name the folder that holds {data.train}"
            f" and {data.val} (--config.data.root=FOLDER)"
        )
    if data.name == "shards" and not data.root:
        raise UserError(
            "config.data.root is empty: name the folder that mljax.data.shard wrote "
            "(--config.data.root=FOLDER)"
        )
    if data.name == "tfds" and not data.tfds_name:
        raise UserError('config.data.tfds_name is empty: name a builder ("voc/2007")')
    for key in ("train", "val"):
        if data.name != "shapes" and not data[key]:
            raise UserError(f"config.data.{key} is empty: see configs/common.py")
    canvas, size = data.resize_on_device, data.image_size
    longest = max(size) if isinstance(size, tuple) else size
    if 0 < canvas < longest:
        raise UserError(
            f"config.data.resize_on_device = {canvas}: must be 0 (resized on the host) "
            f"or at least the {longest} pixels of config.data.image_size"
        )
    if canvas and data.randaugment.n:
        raise UserError(
            f"config.data.resize_on_device = {canvas}: does not go with "
            f"config.data.randaugment.n = {data.randaugment.n}, which works on "
            "resized pictures on the host; set one of the two to 0"
        )
    table = data.table
    if bool(table.file) != bool(table.split):
        raise UserError(
            "config.data.table.file and config.data.table.split belong together: one "
            "file, and the column that tells its two parts apart"
        )
    if table.labels and table.columns:
        raise UserError(
            "config.data.table.labels (one column with lists) and "
            "config.data.table.columns (a column a label) exclude each other"
        )


def idle(config: ConfigDict) -> set[str]:
    """The keys that were changed and do nothing beside others that the config sets;
    not those of other losses, heads, optimisers, schedules and sources."""
    return set(config_idle.found(config, flatten(config), flatten(common())))


def all_idle(config: ConfigDict) -> set[str]:
    """`idle`, and the settings of all that the config does not use."""
    flat = flatten(config)
    return set(config_idle.found(config, flat, flatten(common()), flat.keys()))


def validate_devices(config: ConfigDict, devices: int) -> None:
    """Raises UserError if a batch cannot be split evenly over `devices`."""
    parts = devices * _first_pass_parts(config)
    if config.sam.every_images > 1 and config.batch_size % parts:
        nearest = max(parts, round(config.batch_size / parts) * parts)
        raise UserError(
            f"config.sam.every_images = {config.sam.every_images}: the images of the "
            f"first pass must be shared equally by the {devices} devices; "
            f"config.batch_size = {config.batch_size} must be divisible by {parts}; "
            f"{nearest} would do"
        )
    parts = devices * config.optim.accumulate
    if config.batch_size % parts:
        nearest = max(parts, round(config.batch_size / parts) * parts)
        raise UserError(
            f"config.batch_size = {config.batch_size}: must be divisible by {parts} "
            f"({devices} devices x optim.accumulate = {config.optim.accumulate}); "
            f"{nearest} would do"
        )


def fit_devices(config: ConfigDict, devices: int) -> None:
    """Changes the config of a run so that its model can be evaluated on `devices`,
    whatever it was trained on."""
    config.mesh.data, config.mesh.fsdp = -1, 1
    without_step(config, devices)


def without_step(config: ConfigDict, devices: int) -> None:
    """Changes what only a training step needs to what fits wherever evaluation does."""
    config.eval.batch_size = round_up(config.eval.batch_size, devices)
    config.batch_size, config.optim.accumulate = config.eval.batch_size, 1
    config.sam.every_images = config.sam.groups = config.model.batch_norm_groups = 1


def round_up(images: int, devices: int) -> int:
    """So many images, or as few more as `devices` can share equally."""
    return devices * -(-images // devices)


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


def _parse_size(text: str) -> int | tuple[int, ...]:
    """ "448" -> 448; "320,480", "(320, 480)" and "[320, 480]" -> (320, 480)."""
    parts = [int(part) for part in text.strip("()[] ").split(",")]
    return parts[0] if len(parts) == 1 else tuple(parts)
