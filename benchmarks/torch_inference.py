"""PyTorch's side of inference.py, in an environment of its own."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from side_by_side import answer
from torch_step import CUDA, DEVICE, SCALE, classifier, timm, torch


def predictor(
    model: torch.nn.Module, layout: torch.memory_format, half: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images [batch, H, W, 3] -> probabilities, both in the host's memory."""
    model.eval()
    if hasattr(model.head, "fold"):
        model.head.fold()
    kind = torch.bfloat16 if half else torch.float32
    model.backbone.to(kind)
    model.head.to(kind)

    def predict(images: torch.Tensor) -> torch.Tensor:
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x.to(kind).contiguous(memory_format=layout)
        return torch.sigmoid(SCALE * model(x).float())

    return predict


def on_the_host(predict: Callable) -> Callable[[np.ndarray], np.ndarray]:
    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return predict(torch.from_numpy(images).to(DEVICE)).cpu().numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("worker", "backbone", "head", "dtype"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--compile", type=int)
    args, _ = parser.parse_known_args()
    folder, half = Path(args.worker), args.dtype == "bfloat16"
    layouts = {"channels_last": torch.channels_last}
    if not CUDA:
        layouts["contiguous"] = torch.contiguous_format
    variants = {}
    for name, layout in layouts.items():
        model = classifier(args, folder, layout, args.head)
        variants[f"eager {name}"] = predictor(model, layout, half)
    if args.compile or CUDA:
        plain = variants["eager channels_last"]
        # A program for each batch size.
        variants["compile"] = torch.compile(plain, dynamic=False)
        if CUDA:
            variants["compile, CUDA graphs"] = torch.compile(
                plain, dynamic=False, mode="reduce-overhead"
            )
    images = np.load(folder / "images.npy")
    outputs, runs = {}, {}
    for name, predict in variants.items():
        run = on_the_host(predict)
        outputs[name] = run(images).ravel().tolist()
        for count in args.batch:
            part = images[:count]
            run(part)
            runs[f"{name}, batch {count}"] = lambda run=run, part=part: run(part)
    about = {"torch": torch.__version__, "timm": timm.__version__}
    answer({**about, "outputs": outputs}, runs)


if __name__ == "__main__":
    main()
