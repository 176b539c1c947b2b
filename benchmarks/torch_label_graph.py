"""PyTorch's side of label_graph.py, in an environment of its own."""

import argparse
import copy
from pathlib import Path

import numpy as np
from side_by_side import answer
from torch_inference import on_the_host, predictor
from torch_step import CUDA, DEVICE, Training, aam, timm, torch

LAYOUT = torch.channels_last


class Head:
    """Forward and backward of a head on a map [batch, H, W, features] of numpy."""

    def __init__(self, head: torch.nn.Module, fmap: np.ndarray, training: Training):
        x = torch.tensor(fmap, device=DEVICE).permute(0, 3, 1, 2)
        if training.half:
            x = x.bfloat16()
        self.head, self.fmap = head, x.requires_grad_()
        self.call = torch.compile(head) if CUDA else head
        self.half, self.labels = training.half, training.labels
        self.wanted = [self.fmap, *head.parameters()]

    def forward(self, call) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.half):
            cosines = call(self.fmap)
        return aam(cosines.float(), self.labels)

    def loss(self) -> float:
        """Without dropout."""
        self.head.eval()
        with torch.no_grad():
            found = self.forward(self.head).item()
        self.head.train()
        return found

    def step(self) -> float:
        loss = self.forward(self.call)
        torch.autograd.grad(loss, self.wanted)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("worker", "backbone", "dtype"):
        parser.add_argument(f"--{name}")
    for name in ("classes", "size", "batch"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("heads", "parts"):
        parser.add_argument(f"--{name}", nargs="+")
    args, _ = parser.parse_known_args()
    folder = Path(args.worker)
    images, fmap = np.load(folder / "batch.npz")["image"], np.load(folder / "map.npy")
    images = np.resize(images, (8, *images.shape[1:]))
    losses, runs = {}, {}
    for head in args.heads:
        training = Training(args, folder, LAYOUT, head)
        model = training.model
        if "inference" in args.parts:
            used = predictor(copy.deepcopy(model), LAYOUT, training.half)
            run = on_the_host(torch.compile(used, dynamic=False) if CUDA else used)
            run(images)
            runs[f"{head} inference"] = lambda run=run: run(images)
        # A copy: the steps change the model.
        alone = Head(copy.deepcopy(model.head), fmap, training)
        losses[head] = alone.loss()
        if "alone" in args.parts:
            alone.step()
            runs[f"{head} alone"] = alone.step
        if "step" in args.parts:
            losses[f"{head}, first step"] = training.step()
            training.step()
            runs[f"{head} step"] = training.step
    about = {"torch": torch.__version__, "timm": timm.__version__}
    answer({**about, "losses": losses}, runs)


if __name__ == "__main__":
    main()
