"""Fine-tuning: which parameters are trained, and how fast each of them.

Parameters are named by their path, "backbone.layer1.0.conv1.weight". A prefix names
all that is below it: "backbone.layer1" is not the beginning of "backbone.layer10".
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from mljax.errors import UserError
from mljax.models.batch_norm import BatchNorm
from mljax.models.functional import NETWORKS

PyTree = Any

# Both networks of a pair have the same names, behind their own.
_NETWORK = re.compile(rf"({'|'.join(NETWORKS)})\.(?=(backbone|head)\.)")
# What stands before the blocks, and the blocks themselves, with their numbers.
_STEM = re.compile(
    r"backbone\.(body\.)?(conv_stem|conv1|bn1|patch_embed|cls_token|pos_embed)\b"
)
_BLOCK = re.compile(r"backbone\.(?:body\.)?(?:blocks|layer(\d+))((?:\.\d+)+)\.")
_MOST_ROWS = 20  # a longer table shows its ends only


def path_name(path: Any) -> str:
    """A path of jax.tree_util as text: "backbone.conv1.weight", in both of a pair."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    found = _NETWORK.match(name)
    return name[found.end() :] if found else name


def one_network(params: PyTree) -> PyTree:
    """`params`, of a pair those of its first network."""
    return params[NETWORKS[0]] if set(params) == set(NETWORKS) else params


def prefixes(freeze: str) -> list[str]:
    """'backbone.bn1, head' -> ["backbone.bn1", "head"]."""
    return [part.strip() for part in freeze.split(",") if part.strip()]


def frozen_parameters(params: PyTree, freeze: str) -> PyTree | None:
    """Which parameters `freeze`, prefixes separated by commas, names.

    Args:
        params: nested dict of arrays or shape structs.
        freeze: `config.optim.freeze`.

    Returns:
        A tree like `params` with a bool for each array; None if `freeze` is "".

    Raises:
        UserError: no parameter is below a prefix, or all are below them.
    """
    names = prefixes(freeze)
    if not names:
        return None
    for name in names:
        _require(name, params)
    frozen = jax.tree.map_with_path(
        lambda path, _: _is_below(path_name(path), names), params
    )
    if all(jax.tree.leaves(frozen)):
        raise UserError(
            f"config.optim.freeze = {freeze!r}: leaves no parameter to be trained"
        )
    return frozen


def hold(params: PyTree, frozen: PyTree | None) -> PyTree:
    """`params`, the frozen ones as constants: their gradient is 0 and costs nothing."""
    if frozen is None:
        return params
    return jax.tree.map(
        lambda f, x: jax.lax.stop_gradient(x) if f else x, frozen, params
    )


def keep(old: PyTree, new: PyTree, frozen: PyTree | None) -> PyTree:
    """`new`, where it is frozen `old`."""
    if frozen is None:
        return new
    return jax.tree.map(lambda f, a, b: a if f else b, frozen, old, new)


def fix_batch_norm(model: nnx.Module, freeze: str) -> nnx.Module:
    """`model`, in which every frozen BatchNorm uses its running statistics.

    They do not move, so that the frozen part computes in training what it computes in
    evaluation, up to dropout and stochastic depth.
    """
    names = prefixes(freeze)
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, BatchNorm) and _is_below(".".join(map(str, path)), names):
            layer.fixed = True
    return model


def group_batch_norm(model: nnx.Module, groups: int) -> None:
    """Every BatchNorm of `model` works on `groups` equal parts of the batch."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, BatchNorm):
            layer.groups = groups


def lr_factors(
    params: PyTree, backbone_lr_factor: float, layer_decay: float
) -> PyTree | None:
    """The learning rate of every parameter over that of the head.

    In the backbone it is backbone_lr_factor * layer_decay ** (last - depth). The depth
    of what stands before the blocks (stem, patch and position embeddings) is 0, that
    of the n blocks 1 ... n in the order in which they run, and what comes after them
    (a last convolution or norm layer) is as deep as the head: last = n + 1.

    Returns:
        A tree like `params` with a float for each array; None if all are 1.

    Raises:
        UserError: layer_decay is not 1 and the backbone has no blocks that are known.

    References:
        Clark et al., "ELECTRA" (2020), arXiv 2003.10555; for images Bao et al., "BEiT"
        (2022), arXiv 2106.08254. The blocks are counted as in timm.
    """
    if backbone_lr_factor == 1 and layer_decay == 1:
        return None
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    names = [name for name in names if _is_below(name, ["backbone"])]
    blocks = sorted({key for name in names if (key := _block(name))})
    if layer_decay != 1 and not blocks:
        raise UserError(
            f"config.optim.layer_decay = {layer_decay}: this backbone has no blocks "
            "whose order is known (blocks.N or layerN.M); leave it at 1.0"
        )
    below_head = {key: len(blocks) - i for i, key in enumerate(blocks)}

    def factor(path: Any, _: Any) -> float:
        name = path_name(path)
        if not _is_below(name, ["backbone"]):
            return 1.0
        key = _block(name)
        if key:
            steps = below_head[key]
        else:
            steps = len(blocks) + 1 if _STEM.match(name) else 0
        return backbone_lr_factor * layer_decay**steps

    return jax.tree.map_with_path(factor, params)


def report(params: PyTree, optim_config: ConfigDict) -> str:
    """A table of what is frozen and of the learning rates; "" if all are as usual.

    Args:
        params: nested dict of arrays or shape structs.
        optim_config: `config.optim`.
    """
    freeze, epochs = optim_config.freeze, optim_config.freeze_epochs
    frozen = frozen_parameters(params, freeze)
    factors = lr_factors(
        params, optim_config.backbone_lr_factor, optim_config.layer_decay
    )
    if frozen is None and factors is None:
        return ""
    sizes = _flat(jax.tree.map(lambda x: math.prod(x.shape), params))
    is_frozen = dict.fromkeys(sizes, False) if frozen is None else _flat(frozen)
    factor = dict.fromkeys(sizes, 1.0) if factors is None else _flat(factors)
    kinds = {name: (not is_frozen[name], factor[name]) for name in sizes}
    parts: dict[_Kind, list[str]] = {}
    _cover(params, "", kinds, parts)
    rates = {kind: _rate(kind, epochs) for kind in sorted(parts)}
    width = max(len("learning rate"), *map(len, rates.values()))
    rows = []
    for kind, rate in rates.items():
        count = sum(sizes[name] for name in sizes if kinds[name] == kind)
        rows.append(f"{count:>10,}  {rate:<{width}}  {', '.join(parts[kind])}")
    if len(rows) > _MOST_ROWS:
        half = _MOST_ROWS // 2
        rows[half:-half] = [f"{'...':>10}  {len(rows) - 2 * half} more"]
    return "\n".join([f"{'parameters':>10}  learning rate", *rows])


_Kind = tuple[bool, float]  # (whether it is trained, its factor)


def _rate(kind: _Kind, freeze_epochs: int) -> str:
    is_trained, factor = kind
    if is_trained:
        return f"x {factor:.3g}"
    if not freeze_epochs:
        return "frozen"
    epochs = "1 epoch" if freeze_epochs == 1 else f"{freeze_epochs} epochs"
    return f"frozen for {epochs}, then x {factor:.3g}"


def _cover(
    node: Any, name: str, kinds: Mapping[str, _Kind], parts: dict[_Kind, list[str]]
) -> _Kind | None:
    """The kind of all that is below `name`, or None where there are several.

    Then `parts` gets the names of the largest subtrees that are of one kind.
    """
    if not isinstance(node, Mapping):
        return kinds[name]
    found = {}
    for key, child in node.items():
        below = f"{name}.{key}" if name else str(key)
        found[below] = _cover(child, below, kinds, parts)
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    for below, kind in found.items():
        if kind is not None:
            parts.setdefault(kind, []).append(below)
    return None


def _flat(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree.leaves_with_path(tree)}


def _is_below(name: str, prefixes: list[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def _block(name: str) -> tuple[int, ...]:
    """The place of the block that a parameter is part of; () for none."""
    found = _BLOCK.match(name)
    if found is None:
        return ()
    layer, numbers = found.groups()
    return int(layer or 0), *map(int, numbers[1:].split("."))


def _require(name: str, params: PyTree) -> None:
    """Raises UserError, with the choices, if nothing is called `name`."""
    node, seen = one_network(params), ""
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            choices = sorted(node) if isinstance(node, Mapping) else ["no parts"]
            raise UserError(
                f"config.optim.freeze: there is no parameter {name!r}; "
                f"{seen or 'the model'} has {', '.join(choices)}"
            )
        node, seen = node[part], f"{seen}.{part}" if seen else part
