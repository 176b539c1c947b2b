"""PyTorch's side of end_to_end.py, in an environment of its own; needs pillow too."""

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
from end_to_end import rate, rates, watched
from PIL import Image
from side_by_side import answer
from torch_step import CUDA, DEVICE, Training, timm, torch


class Photos(torch.utils.data.Dataset):
    """uint8 images [size, size, 3], half of them mirrored, and labels."""

    def __init__(self, root: Path, size: int):
        listed = json.loads((root / "train.json").read_text())
        columns = {name: i for i, name in enumerate(listed["classes"])}
        self.paths = [root / row[0] for row in listed["images"]]
        self.labels = torch.zeros(len(self.paths), len(columns))
        for row, image in zip(self.labels, listed["images"], strict=True):
            row[[columns[name] for name in image[1]]] = 1
        self.size = (size, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self.paths[i]) as image:
            image = image.convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), self.labels[i]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("worker", "root", "backbone", "dtype"):
        parser.add_argument(f"--{name}")
    for name in ("size", "batch", "steps"):
        parser.add_argument(f"--{name}", type=int)
    args, _ = parser.parse_known_args()
    training = Training(args, Path(args.worker), torch.channels_last)
    own = training.images, training.labels
    photos = Photos(Path(args.root), args.size)
    training.step()
    training.step()

    def loader():
        return torch.utils.data.DataLoader(
            photos,
            args.batch,
            shuffle=True,
            drop_last=True,
            num_workers=len(os.sched_getaffinity(0)),
            pin_memory=CUDA,
        )

    def bare() -> dict[str, float]:
        training.images, training.labels = own
        begun = time.perf_counter()
        for _ in range(args.steps):
            training.step()
        return rate(args.steps, args.batch, begun)

    def data() -> dict[str, float]:
        ready = iter(loader())
        next(ready)
        begun = time.perf_counter()
        count = min(args.steps, len(photos) // args.batch - 1)
        for _ in range(count):
            next(ready)
        return rate(count, args.batch, begun)

    def epoch() -> dict[str, float]:
        marks: list[tuple[float, float]] = []
        ready = watched(iter(loader()), marks)
        for _ in range(len(photos) // args.batch):
            images, labels = next(ready)
            training.images = images.to(DEVICE, non_blocking=True)
            training.labels = labels.to(DEVICE, non_blocking=True)
            training.step()
        return rates(marks, args.batch)

    about = {"torch": torch.__version__, "timm": timm.__version__}
    answer(about, {"bare": bare, "epoch": epoch, "data": data})


if __name__ == "__main__":
    main()
