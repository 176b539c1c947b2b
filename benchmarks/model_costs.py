"""Parameters and multiply-adds of every backbone with every head.

python benchmarks/model_costs.py [--backbone NAME] [--head NAME] [--size 448] \
    [--classes 80]

Multiply-adds: of convolutions and matrix products (attention's own too), one for each
multiply-accumulate, for one image at inference, with the gate of a label graph folded
away. Not counted is what works element by element: normalisation, activations, pooling,
the blurs of TResNet. Parameters: what training changes, before anything is folded, so
the fixed queries of ML-Decoder and the embeddings of a label graph are left out.

Both are read off the traced computation; nothing is computed and no weights are made.
The published figures (arXiv 2209.06585) stand beside those they belong to. Those of
EfficientNetV2 come out within 0.01 if BatchNorm counts too, as two operations a number
(S 12.27, L 49.92); that of TResNet, whose normalisation was a layer of its own kind,
does as it is.
"""

import argparse
import math
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params

from mljax.config import common
from mljax.errors import UserError
from mljax.models import BACKBONES, HEADS, Classifier, build_model, cpu, label_graph

# (backbone, head) -> 10^9 multiply-adds at 448 x 448 with 80 labels.
PUBLISHED = {
    ("tf_efficientnetv2_s", "ml_decoder"): 12.28,
    ("tf_efficientnetv2_l", "ml_decoder"): 49.92,
    ("tresnet_v2_l", "ml_decoder"): 36.15,
}


def build(backbone: str, head: str, num_classes: int, folded: bool) -> Classifier:
    """The classifier with shapes for weights; folded: as it is at inference."""
    config = common().model
    config.backbone, config.head = backbone, head

    def make() -> Classifier:
        model = build_model(
            config, num_classes, angular=head != "linear", rngs=nnx.Rngs(0)
        )
        if folded:
            model.head = label_graph.fold(model.head)
        return model

    return nnx.eval_shape(make)


def parameters(backbone: str, head: str, num_classes: int = 80) -> int:
    learned = nnx.state(build(backbone, head, num_classes, folded=False), nnx.Param)
    return sum(x.size for x in jax.tree.leaves(learned))


def multiply_adds(
    backbone: str, head: str, num_classes: int = 80, size: int = 448
) -> int:
    """Of one image of `size` x `size` pixels."""
    graph, state = nnx.split(build(backbone, head, num_classes, folded=True))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with cpu.plain_forms():
        jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, image)
    return count(jaxpr.jaxpr)


def count(jaxpr: Any) -> int:
    """Multiply-adds of a jaxpr and of those inside it."""
    total = 0
    for equation in jaxpr.eqns:
        outputs, inner = equation.outvars[0].aval.size, equation.params
        if equation.primitive.name == "conv_general_dilated":
            # Each output is a sum over its filter: all axes but the output channels.
            weight = equation.invars[1].aval
            channels = weight.shape[inner["dimension_numbers"].rhs_spec[0]]
            total += outputs * weight.size // channels
        elif equation.primitive.name == "dot_general":
            (summed, _), _ = inner["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += outputs * math.prod(shape[axis] for axis in summed)
        else:
            called = sum(count(body) for body in jaxprs_in_params(inner))
            if called and equation.primitive.name in ("scan", "while", "cond"):
                raise NotImplementedError("how often a loop's body runs is not known")
            total += called
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=list(BACKBONES))
    parser.add_argument("--head", choices=list(HEADS))
    parser.add_argument("--size", type=int, default=448, help="pixels")
    parser.add_argument("--classes", type=int, default=80)
    args = parser.parse_args()
    if min(args.size, args.classes) < 1:
        parser.error("--size and --classes must be 1 or more")
    print(f"{args.size} x {args.size} pixels, {args.classes} labels")
    print(f"{'backbone':<33} {'head':<12} {'parameters':>11} {'multiply-adds':>14}")
    for backbone in [args.backbone] if args.backbone else BACKBONES:
        for head in [args.head] if args.head else HEADS:
            millions = parameters(backbone, head, args.classes) / 1e6
            try:
                madds = multiply_adds(backbone, head, args.classes, args.size)
            except UserError as error:
                print(f"{backbone:<33} {head:<12} {millions:>9.2f} M  {error}")
                continue
            billions = madds / 1e9
            line = f"{backbone:<33} {head:<12} {millions:>9.2f} M {billions:>12.2f} G"
            published = PUBLISHED.get((backbone, head))
            if published and (args.size, args.classes) == (448, 80):
                off = billions / published - 1
                line += f"  published {published} G ({100 * off:+.1f} %)"
            print(line, flush=True)


if __name__ == "__main__":
    main()
