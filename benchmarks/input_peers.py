"""The other input pipelines of input_pipeline.py, which runs this file.

python input_peers.py pil|opencv|grain FOLDER RESULT.json

Needs neither mljax nor TensorFlow. A DataLoader of PyTorch has one worker process.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import numpy as np

BATCH = 32
CASES = [(size, target) for size in ("500x375", "1280x960") for target in (224, 448)]


def draw(rng, width: int, height: int) -> tuple[tuple[int, int, int, int], bool]:
    """A random crop (x, y, width, height) of 0.35 to 1 of the area; whether to flip."""
    area = width * height * rng.uniform(0.35, 1)
    shape = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    w = min(width, max(1, round(math.sqrt(area * shape))))
    h = min(height, max(1, round(math.sqrt(area / shape))))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return (x, y, w, h), rng.random() < 0.5


def with_pil(path: str, target: int, rng, operations: int = 0):
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
    (x, y, w, h), flip = draw(rng, *image.size)
    size, box = (target, target), (x, y, x + w, y + h)
    image = image.resize(size, Image.Resampling.BILINEAR, box)
    for _ in range(operations):
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        if rng.random() < 0.5:
            image = operation(image, rng.integers(1, 10) / 9, rng.choice([-1, 1]))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def _operations() -> list:
    """The fifteen of RandAugment, as one writes them with PIL."""
    from PIL import Image, ImageDraw, ImageEnhance, ImageOps

    def affine(image, *matrix):
        fill = (128, 128, 128)
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, fillcolor=fill
        )

    def square(image, side):
        image = image.copy()
        box = (50, 50, 50 + side, 50 + side)
        ImageDraw.Draw(image).rectangle(box, (125, 122, 113))
        return image

    def enhance(kind):
        return lambda i, v, s: kind(i).enhance(1 + 0.9 * v * s)

    return [
        lambda i, v, s: ImageOps.invert(i),
        lambda i, v, s: square(i, 20 * v),
        enhance(ImageEnhance.Sharpness),
        enhance(ImageEnhance.Contrast),
        enhance(ImageEnhance.Color),
        enhance(ImageEnhance.Brightness),
        lambda i, v, s: ImageOps.autocontrast(i),
        lambda i, v, s: ImageOps.posterize(i, round(8 - 4 * v)),
        lambda i, v, s: affine(i, 1, 0.3 * v * s, 0, 0, 1, 0),
        lambda i, v, s: affine(i, 1, 0, 0, 0.3 * v * s, 1, 0),
        lambda i, v, s: affine(i, 1, 0, 0.45 * v * s * i.width, 0, 1, 0),
        lambda i, v, s: affine(i, 1, 0, 0, 0, 1, 0.45 * v * s * i.height),
        lambda i, v, s: i.rotate(30 * v * s, fillcolor=(128, 128, 128)),
        lambda i, v, s: ImageOps.equalize(i),
        lambda i, v, s: ImageOps.solarize(i, 256 - 256 * v),
    ]


def with_opencv(path: str, target: int, rng, interpolation: str):
    import cv2

    image = cv2.imread(path)
    (x, y, w, h), flip = draw(rng, image.shape[1], image.shape[0])
    kind = getattr(cv2, interpolation)
    image = cv2.resize(image[y : y + h, x : x + w], (target, target), None, 0, 0, kind)
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return cv2.flip(image, 1) if flip else image


def loader(paths: list[str], load):
    """Batches of PyTorch's DataLoader."""
    import torch

    class Images(torch.utils.data.IterableDataset):
        def __iter__(self):
            torch.set_num_threads(1)
            rng = np.random.default_rng(0)
            while True:
                for i in rng.permutation(len(paths)):
                    yield torch.from_numpy(np.array(load(paths[i], rng)))

    return iter(torch.utils.data.DataLoader(Images(), BATCH, num_workers=1))


def grain_batches(paths: list[str], load):
    import grain

    def one(path, rng):
        return load(path, rng)

    images = grain.MapDataset.source(paths).seed(0).shuffle().repeat()
    images = images.random_map(one).batch(BATCH)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(images.to_iter_dataset(options))


def rate(batches, rounds: int, seconds: float) -> float:
    """Images a second of processor time: the median of some rounds, the first ones not
    counted."""
    found = []
    for _ in range(rounds + 2):
        begun, used, images = time.perf_counter(), processor_seconds(), 0
        while time.perf_counter() - begun < seconds:
            images += len(next(batches))
        found.append(images / (processor_seconds() - used))
    return statistics.median(found[2:])


def processor_seconds() -> float:
    """Of this process, and of its workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("pil", "opencv", "grain"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    if args.kind == "pil":
        global OPERATIONS
        OPERATIONS = _operations()
        kinds = {
            "torch DataLoader, PIL": (loader, with_pil, 0),
            "torch DataLoader, PIL, RandAugment": (loader, with_pil, 2),
        }
    elif args.kind == "opencv":
        import cv2

        cv2.setNumThreads(1)
        kinds = {
            "torch DataLoader, OpenCV, bilinear": (loader, with_opencv, "INTER_LINEAR"),
            "torch DataLoader, OpenCV, area": (loader, with_opencv, "INTER_AREA"),
        }
    else:
        import cv2

        cv2.setNumThreads(1)
        kinds = {
            "grain, OpenCV, bilinear": (grain_batches, with_opencv, "INTER_LINEAR")
        }
    results = {}
    for name, (make, load, setting) in kinds.items():
        results[name] = []
        for size, target in CASES:
            paths = sorted(str(p) for p in (args.folder / size).iterdir())
            one = lambda path, rng, f=load, t=target, s=setting: f(path, t, rng, s)  # noqa: E731
            batches = make(paths, one)
            results[name].append(rate(batches, args.rounds, args.seconds))
            del batches
    args.output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
