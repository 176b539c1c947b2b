"""Settings that do nothing beside others: they are refused, not passed over."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mljax.config_rules import BELONGS_TO, FLAGS_BELONG_TO, NAMES

Check = tuple[str, Any, str]  # a key, whether it acts, and what it needs if it does not


def found(
    config: ConfigDict,
    flat: Mapping[str, Any],
    defaults: Mapping[str, Any],
    chosen: Collection[str] | None = None,
) -> dict[str, str]:
    """What was changed and does nothing: key -> what it would need.

    Args:
        flat, defaults: the config, and that of `configs/common.py`, as `config.flatten`
            gives them.
        chosen: the keys in question. None: all, but not the settings of other losses,
            heads, optimisers, schedules and sources, which a config may well keep.

    What belongs to a source, head or loss that is not of mljax is not known: it may be
    of the user's own, or misspelt, which is said later and better.
    """
    unknown = {
        key.partition(".")[0] for key, known in NAMES.items() if flat[key] not in known
    }
    idle: dict[str, str] = {}
    for checks in (_of_data, _of_model, _of_optim, _of_sam, _of_others):
        if chosen is None and checks is _of_others:
            continue
        for key, acts, needed in checks(config):
            asked = chosen is None or key in chosen
            asked = asked and key.partition(".")[0] not in unknown
            if asked and flat[key] != defaults[key] and not acts:
                idle.setdefault(key, needed)
    return idle


def _of_data(config: ConfigDict) -> Iterator[Check]:
    data = config.data
    for key, names in BELONGS_TO.items():
        needed = f"config.data.name = {' or '.join(names)}"
        yield f"data.{key}", data.name in names, needed
    for key in data.table:
        yield f"data.table.{key}", data.name == "table", "config.data.name = table"
    lists = "config.data.table.labels"
    yield "data.table.empty", not data.table.labels, "a column a label"
    yield "data.table.unknown", data.table.labels, lists
    yield "data.table.separator", data.table.labels, lists
    bilinear = data.resize == "bilinear"
    yield "data.antialias", bilinear, "config.data.resize = bilinear"
    yield "data.crop_ratio", data.crop_area < 1, "config.data.crop_area below 1"
    for key in ("m", "prob"):
        operations = "config.data.randaugment.n above 0"
        yield f"data.randaugment.{key}", data.randaugment.n, operations
    yield "data.cutout_side", data.cutout, "config.data.cutout above 0"
    mixup, cutmix = data.mixup_alpha > 0, data.cutmix_alpha > 0
    for key in ("mixup_alpha", "cutmix_alpha"):
        yield f"data.{key}", config.batch_size > 1, "config.batch_size above 1"
    either = "config.data.mixup_alpha or config.data.cutmix_alpha above 0"
    yield "data.mixup_prob", mixup or cutmix, either
    yield "data.mixup_switch_prob", mixup and cutmix, either.replace(" or ", " and ")


def _of_model(config: ConfigDict) -> Iterator[Check]:
    counting = "counting (adjacency = '')"
    yield "model.graph.by_occurrences", not config.model.graph.adjacency, counting
    is_tresnet = config.model.backbone.startswith("tresnet")
    yield "model.prelu", is_tresnet, "config.model.backbone = tresnet_m, tresnet_l, ..."


def _of_optim(config: ConfigDict) -> Iterator[Check]:
    optim = config.optim
    yield "optim.nesterov", optim.name == "sgd", "config.optim.name = sgd"
    for key in ("freeze_epochs", "freeze_stats"):
        yield f"optim.{key}", optim.freeze, "config.optim.freeze"


def _of_sam(config: ConfigDict) -> Iterator[Check]:
    sam, by_gradient = config.sam, config.sam.direction == "gradient"
    cheaper = ("direction", "groups", "every_steps", "every_images")
    for key in (*cheaper, "adaptive"):
        yield f"sam.{key}", sam.rho > 0, "config.sam.rho above 0"
    yield "sam.reuse", sam.every_steps > 1, "config.sam.every_steps above 1"
    for key in (*cheaper[1:], "adaptive", "update_stats"):
        yield f"sam.{key}", by_gradient, "config.sam.direction = gradient"


def _of_others(config: ConfigDict) -> Iterator[Check]:
    """Settings of a source, head, loss, optimiser or schedule that another replaces."""
    for key, names in FLAGS_BELONG_TO.items():
        needed = f"config.data.name = {' or '.join(names)}"
        yield f"data.{key}", config.data.name in names, needed

    model, graph = config.model, config.model.graph
    for head in ("ml_decoder", "query2label", "csra"):
        for key in model[head]:
            needed = f"config.model.head = {head}"
            yield f"model.{head}.{key}", model.head == head, needed
    is_graph, is_gat = model.head in ("gcn", "gat"), model.head == "gat"
    for key in graph:
        yield f"model.graph.{key}", is_graph, "config.model.head = gcn or gat"
    random = "random vectors (embeddings = '')"
    yield "model.graph.embedding_dim", not graph.embeddings, random
    is_file = graph.embeddings.endswith(".npy")
    yield "model.graph.embedding_std", not is_file, "random vectors, or those of words"
    yield "model.graph.attention_dropout", is_gat, "config.model.head = gat"

    loss, aam = config.loss, config.loss.aam
    for name in ("focal", "asl", "aam"):
        for key in loss[name]:
            yield f"loss.{name}.{key}", loss.name == name, f"config.loss.name = {name}"
    focuses = aam.gamma_neg or aam.gamma_pos
    yield "loss.aam.probability_margin", focuses, "a gamma of aam above 0"

    optim, sgd = config.optim, config.optim.name == "sgd"
    one_cycle = optim.schedule == "one_cycle"
    kept = not (one_cycle and optim.cycle_momentum)
    yield "optim.momentum", sgd, "config.optim.name = sgd"
    for key in ("b1", "b2", "eps"):
        yield f"optim.{key}", not sgd, "config.optim.name = adamw or lamb"
    for key in ("momentum", "b1"):
        yield f"optim.{key}", kept, "config.optim.cycle_momentum = false"
    turns = optim.schedule != "constant"
    yield "optim.pct_start", turns, "config.optim.schedule = one_cycle or cosine"
    for key in ("div_factor", "final_div_factor", "cycle_momentum"):
        yield f"optim.{key}", one_cycle, "config.optim.schedule = one_cycle"
    yield "sam.update_stats", config.sam.rho > 0, "config.sam.rho above 0"
    yield "ema.decay", not config.ema.half_life, "config.ema.half_life = 0"
    patient = config.train.patience
    yield "train.warmup_epochs", patient, "config.train.patience above 0"
