"""PyTorch weights to a checkpoint of mljax and back, every tensor accounted for.

python -m mljax.import_weights --model tf_efficientnetv2_s.in21k --from FILE --to DIR
python -m mljax.import_weights --model resnet101 --head gcn --from best.pth --to DIR
python -m mljax.import_weights --export --from WORKDIR --to FILE.safetensors

Heavy imports wait until the flags are known to be right.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mljax import config as configs
from mljax import main as program
from mljax.errors import UserError

_HEADS = ("linear", "gcn", "gat", "ml_decoder", "query2label", "csra")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags; what begins with `--config.` becomes `overrides`, a list of pairs."""
    parser = argparse.ArgumentParser(
        prog="python -m mljax.import_weights",
        allow_abbrev=False,
        description="Import PyTorch weights (timm's, or whole checkpoints of the "
        "paper's implementation) into a directory for config.init_from; with --export "
        "the way back.",
        epilog="--config.KEY=VALUE stores what the tensors do not tell, for example "
        "--config.model.pool=max or --config.loss.aam.scale=17.",
    )
    add = parser.add_argument
    source = "a .safetensors or .pth file, or hf://timm/NAME"
    add("--from", dest="source", required=True, metavar="WHAT", help=source)
    add("--to", required=True, metavar="PATH", help="a new directory")
    add("--model", help="the backbone, with or without timm's tag")
    add("--head", choices=_HEADS, help="that the tensors are of; default linear")
    add("--loss", choices=("aam", "bce", "asl"), help="it was trained with")
    add("--classes", metavar="FILE", help="JSON list, annotation file or text")
    add("--key", default="", help="of a .pth file: take the weights under this key")
    add("--export", action="store_true", help="from a work directory or step to a file")
    add("--names", choices=("timm", "paper"), help="of --export; default timm")
    args, rest = parser.parse_known_args(argv)
    args.overrides = []
    for text in rest:
        key, equals, value = text.removeprefix("--config.").partition("=")
        if not text.startswith("--config.") or not equals:
            parser.error(f"unknown flag {text} (settings are --config.KEY=VALUE)")
        args.overrides.append((key, value))
    other = ["names"]
    if args.export:
        other = ["model", "head", "loss", "classes", "key", "overrides"]
    for name in other:
        if getattr(args, name):
            flag = "--config.KEY=VALUE" if name == "overrides" else f"--{name}"
            kind = "without" if args.export else "with"
            parser.error(f"{flag} goes {kind} --export")
    return args


def import_file(args: argparse.Namespace) -> None:
    """`--from FILE --to DIR`: strictly, and only then is DIR made."""
    from mljax import checkpoint
    from mljax.models import BACKBONES, hub, paper_names, torch_files

    remote = args.source.startswith(hub.PREFIX)
    tag = args.source.rpartition("/")[2] if remote else ""
    name = (args.model or tag).partition(".")[0]
    if name not in BACKBONES:
        raise UserError(
            f"--model {args.model or tag}: must be one of {', '.join(BACKBONES)}, with "
            "or without a tag like .in21k"
        )
    to = Path(args.to).absolute()
    checkpoint.check_free(to)
    file = hub.fetch(args.source) if remote else Path(args.source)
    weights = torch_files.read(file, args.key)
    tensors = paper_names.without_prefixes(weights.tensors)
    config, num_classes = _settings(args, name, tensors)
    names = _class_names(args.classes, weights.class_names, num_classes)
    try:
        variables, notes = _load(config, names, tensors)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    about = {
        "config": config.to_dict(),
        "class_names": names,
        "imported_from": args.source if remote else file.name,
    }
    checkpoint.save_variables(to, variables, about)

    import jax

    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    print(f"read:    {file}: {len(weights.tensors)} tensors")
    described = f"{num_classes} classes, loss {config.loss.name}"
    print(
        f"model:   {name} + {config.model.head}, {count / 1e6:.2f} M parameters, "
        + (described if num_classes else "no classifier")
    )
    for note in weights.notes + notes:
        print(f"note:    {note}")
    print(f"written: {to} (--config.init_from={shlex.quote(args.to)})")


def _settings(
    args: argparse.Namespace, backbone: str, tensors: dict[str, Any]
) -> tuple[ConfigDict, int]:
    """The config that describes the weights, and their number of classes."""
    import numpy as np

    from mljax.models import paper_names, tresnet_abn

    head = args.head or "linear"
    found = paper_names.head_of(tensors)
    if found != head:
        raise UserError(f"{args.source}: its tensors are of --head {found}, not {head}")
    sizes = paper_names.read_head(tensors)
    num_classes, cosine = sizes.pop("num_classes"), sizes.pop("cosine")
    if cosine is None and args.loss is None:
        raise UserError(f"--loss is missing: the tensors of {head} do not tell it")
    loss = args.loss or ("aam" if cosine else "bce")
    if cosine is not None and cosine != (loss == "aam"):
        kind = "has a cosine classifier: --loss aam" if cosine else "has none of aam"
        raise UserError(f"--loss {loss}: {args.source} {kind}")
    config = configs.common()
    config.model.backbone, config.model.head, config.loss.name = backbone, head, loss
    slopes = [v for k, v in tensors.items() if tresnet_abn.is_slope(k)]
    config.model.prelu = any(map(np.any, slopes))
    if head in config.model:
        config.model[head].update(sizes)
    if head in ("gcn", "gat"):
        scale = _hidden_dim_scale(backbone, sizes.pop("hidden"))
        config.model.graph.update(hidden_dim_scale=scale, **sizes)
    for key, value in args.overrides:
        if key in ("model.backbone", "model.head", "loss.name"):
            raise UserError(f"--config.{key}: use --model, --head and --loss")
        configs.override(config, key, value)
    checked = config.copy_and_resolve_references()
    checked.data.root = "."  # an import has no data
    configs.validate(checked, {key for key, _ in args.overrides})
    return config, num_classes


def _hidden_dim_scale(backbone: str, hidden: int) -> float:
    """The setting with which a graph head has this many hidden units."""
    from flax import nnx

    from mljax.models import BACKBONES

    made: Any = nnx.eval_shape(lambda: BACKBONES[backbone](rngs=nnx.Rngs(0)))
    scale = made.num_features / hidden
    if int(made.num_features / scale) != hidden:  # rounding took it below
        scale = made.num_features / (hidden + 0.5)
    return scale


def _load(
    config: ConfigDict, names: list[str], tensors: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The variables of a model with these weights, and notes."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from mljax import losses
    from mljax.label_graph_data import LabelGraph
    from mljax.models import build_model, import_torch, tresnet_abn
    from mljax.models.functional import split

    graph = None
    if config.model.head in ("gcn", "gat"):  # a placeholder in the shapes of the file
        edges, vectors = np.zeros((len(names),) * 2), np.zeros(tensors["inp"].shape)
        graph = LabelGraph(names, edges, vectors, config.model.graph.tau, [])
    model: Any = build_model(
        config.model,
        max(len(names), 1),
        angular=losses.is_angular(config.loss.name),
        dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(0),
        graph=graph,
    )
    notes = []
    if not names:  # a placeholder, so that all the rest is checked as ever
        features = model.head.classifier.weight.shape[0]
        weight, bias = np.zeros((1, features)), np.zeros(1)
        tensors |= {"classifier.weight": weight, "classifier.bias": bias}
        notes.append("the file has no classifier; a run that starts from it trains one")
    if tresnet_abn.is_original(tensors):
        notes.append("BatchNorm weights are |w| + 1e-5 of the file's (InPlace-ABN)")
    positions = tensors.get("pos_embed", np.zeros(0))
    notes += import_torch.load(model, tensors)
    if positions.ndim == 3 and positions.shape != model.backbone.pos_embed.shape:
        notes.append(
            f"position embeddings resized from {positions.shape[1] - 1} patches to "
            f"{model.backbone.pos_embed.shape[1] - 1}"
        )
    params, batch_stats = split(model)
    if not names:
        del params["head"]["classifier"]
        if not params["head"]:
            del params["head"]
    return {"params": params, "batch_stats": batch_stats}, notes


def _class_names(file: str | None, stored: list[str] | None, count: int) -> list[str]:
    """The names of `count` classes: of `file`, else of the weights, else "0", "1", ...

    Raises UserError if `file` cannot be read or does not name `count` classes.
    """
    if file is None:
        numbers = [str(i) for i in range(count)]
        return stored if stored and len(stored) == count else numbers
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text) if file.endswith(".json") else lines
    except OSError as error:
        raise UserError(f"--classes {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--classes {file}: is no text in UTF-8") from None
    except ValueError as error:
        raise UserError(f"--classes {file}: is not valid JSON ({error})") from None
    if isinstance(names, dict):  # an annotation file; see data.annotations
        names = sorted(names.get("classes", ()))
    if not isinstance(names, list) or len(set(map(str, names))) != count:
        raise UserError(
            f"--classes {file}: must name {count} different classes: a JSON list, an "
            "annotation file, or a text with a name a line"
        )
    names = [str(name) for name in names]
    if stored and names != stored and sorted(names) == sorted(stored):
        raise UserError(
            f"--classes {file}: has the classes of the weights in another order than "
            f"the weights, where {stored[0]!r} is first; leave --classes out"
        )
    return names


def export(args: argparse.Namespace) -> None:
    """`--export --from WORKDIR --to FILE`."""
    from mljax.models import (
        import_torch,
        paper_names,
        pretrained,
        torch_files,
        tresnet_abn,
    )

    torch_files.check_free(args.to)
    model, about = pretrained.restore(args.source)
    if args.names == "paper":
        backbone, head = (import_torch.export(m) for m in (model.backbone, model.head))
        name = about["config"]["model"]["backbone"]
        tensors = paper_names.to_paper(name, model, backbone, head)
    else:
        tensors = import_torch.export(model)
    torch_files.write(args.to, tensors, pretrained.named_classes(about))
    classes = len(about["class_names"])
    print(f"written: {args.to}: {len(tensors)} tensors, {classes} classes")
    slopes = [name for name in tensors if tresnet_abn.is_slope(name)]
    if slopes and args.names != "paper":
        print(f"note:    timm's network has no PReLU, of which are {', '.join(slopes)}")


def run(args: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from absl import logging

    # Orbax tells of one failed write in six tracebacks, and then raises it as well.
    logging.set_verbosity(logging.FATAL)
    if args.export:
        export(args)
    else:
        import_file(args)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, see `mljax.main.command`."""
    return program.command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
