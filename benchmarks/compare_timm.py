"""The backbones beside timm's own, at the same random weights.

Needs torch and timm 1.0.19, which may live in a virtual environment of their own:

    python -m venv torch-env
    torch-env/bin/pip install torch==2.13.0 numpy safetensors pyyaml
    torch-env/bin/pip install --no-deps timm==1.0.19 huggingface_hub packaging tqdm
    torch-env/bin/python benchmarks/compare_timm.py write timm.npz
    python benchmarks/compare_timm.py compare timm.npz

(torchvision is not needed: timm only imports it, and a mock stands in.)

Compared are names and shapes, the number of parameters, maps in evaluation mode for two
image sizes, and the map and running statistics of one pass in training mode, in
float32. The largest difference must stay below 1e-4 of the largest value in evaluation
mode and below 1e-3 in training mode, where it grows from layer to layer.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from golden_weights import golden_weights  # noqa: E402

SQUARE, ODD = (2, 3, 96, 96), (1, 3, 101, 75)
# name: (variance of the weights, image shapes). At a variance of 1.4 the activations of
# EfficientNetV2-L grow to thousands, and timm in float32 is far from timm in float64.
MODELS = {
    "tf_efficientnetv2_s": (1.4, (SQUARE, ODD)),
    "tf_efficientnetv2_m": (1.0, (SQUARE, ODD)),
    "tf_efficientnetv2_l": (1.0, (SQUARE, ODD)),
    "tresnet_m": (1.3, (SQUARE, (1, 3, 128, 76))),
    "tresnet_l": (1.3, (SQUARE, (1, 3, 128, 76))),
    "tresnet_v2_l": (1.3, (SQUARE, (1, 3, 128, 76))),
    "resnet50": (1.0, (SQUARE, ODD)),
    "resnet101": (1.0, (SQUARE, ODD)),
    "vit_tiny_patch16_224": (1.0, ((1, 3, 224, 224), (2, 3, 160, 96))),
    "vit_small_patch16_224": (1.0, ((1, 3, 224, 224), (2, 3, 160, 96))),
    "vit_base_patch16_224": (1.0, ((1, 3, 224, 224), (2, 3, 160, 96))),
}


def weights(shapes: dict[str, tuple[int, ...]], gain: float) -> dict[str, np.ndarray]:
    values = golden_weights(shapes, gain)
    for name in {"pos_embed", "cls_token"} & values.keys():
        values[name] *= 100  # else too small beside the patches to be seen
    return values


def picture(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(123).standard_normal(shape).astype(np.float32)


def write(output: Path, names: list[str]) -> None:
    """Runs timm. Maps are stored as [batch, channels, height, width]."""
    parts = ("", ".ops", ".ops.misc", ".datasets")
    for part in (*parts, ".transforms", ".transforms.functional"):
        sys.modules["torchvision" + part] = MagicMock()
    import timm
    import torch

    arrays = {}
    for name in names:
        gain, shapes = MODELS[name]
        options = dict(dynamic_img_size=True) if name.startswith("vit") else {}
        model = timm.create_model(name, pretrained=False, num_classes=0, **options)
        sizes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
        state = {k: torch.tensor(v) for k, v in weights(sizes, gain).items()}
        model.load_state_dict(state)
        count = sum(x.numel() for x in model.parameters())
        arrays[f"{name}/parameters"] = np.array(count)

        def run(model, shape: tuple[int, ...]) -> np.ndarray:
            with torch.no_grad():
                fmap = model.forward_features(torch.tensor(picture(shape)))
            if fmap.ndim == 3:  # tokens of a ViT, the class token first
                grid = (shape[2] // 16, shape[3] // 16)
                fmap = fmap[:, 1:].transpose(1, 2).unflatten(2, grid)
            return fmap.numpy()

        model.eval()
        for i, shape in enumerate(shapes):
            arrays[f"{name}/map{i}"] = run(model, shape)
        model.train()
        arrays[f"{name}/train"] = run(model, shapes[0])
        for key, value in model.state_dict().items():
            if "running" in key:
                arrays[f"{name}/after/{key}"] = value.numpy()
        print(name, count, flush=True)
    np.savez_compressed(output, **arrays)


def compare(path: Path, names: list[str]) -> bool:
    """Runs ours, prints a line for each model, says whether all agree."""
    import jax
    from flax import nnx

    from mljax.models import build_backbone, import_torch
    from mljax.models.functional import split

    expected, agree = np.load(path), True
    print("model, parameters, then largest differences over largest values:")
    for name in names:
        gain, shapes = MODELS[name]
        model = build_backbone(name, rngs=nnx.Rngs(0))
        sizes = {key: x.shape for key, x in import_torch.export(model).items()}
        import_torch.load(model, weights(sizes, gain))
        graph, state = nnx.split(model)

        def run(state, images, train: bool, graph=graph):
            model = nnx.merge(graph, state)
            fmap = model(images, train=train)
            return fmap, nnx.state(model, nnx.BatchStat)

        compiled = jax.jit(run, static_argnames="train")
        errors = {}
        for i, shape in enumerate(shapes):
            fmap, _ = compiled(state, picture(shape).transpose(0, 2, 3, 1), train=False)
            errors[f"map {i}"] = _error(fmap, expected[f"{name}/map{i}"])
        images = picture(shapes[0]).transpose(0, 2, 3, 1)
        fmap, stats = compiled(state, images, train=True)
        errors["train"] = _error(fmap, expected[f"{name}/train"])
        nnx.update(model, stats)
        after = import_torch.export(model)
        errors["statistics"] = max(
            (
                np.abs(after[key] - value).max() / np.abs(value).max()
                for key, value in _below(expected, f"{name}/after/").items()
            ),
            default=0.0,
        )
        count = sum(x.size for x in jax.tree.leaves(split(model)[0]))
        same = count == expected[f"{name}/parameters"]
        agree &= bool(same) and all(
            error < (1e-4 if kind.startswith("map") else 1e-3)
            for kind, error in errors.items()
        )
        listed = ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
        print(f"{name}: {count:,}{'' if same else ' (timm differs)'}; {listed}")
    print("all agree" if agree else "THEY DIFFER")
    return agree


def _error(fmap, expected: np.ndarray) -> float:
    actual = np.asarray(fmap).transpose(0, 3, 1, 2)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _below(arrays, prefix: str) -> dict[str, np.ndarray]:
    names = [name for name in arrays.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="all if none")
    arguments = parser.parse_args()
    if arguments.step == "write":
        write(arguments.file, arguments.models)
    elif not compare(arguments.file, arguments.models):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
