"""Small data sets on disk for the tests of the data rooms."""

import io
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mljax.config import common


def data_config(root: Path | str = "", **changes) -> ConfigDict:
    config = common().data
    config.root, config.image_size = str(root), 16
    config.update(changes)
    return config


def encode(pixels: np.ndarray | Image.Image, form: str = "JPEG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def blocks(seed: int = 0, height: int = 40, width: int = 53) -> np.ndarray:
    """uint8 [height, width, 3]: squares of random colours."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3))
    big = np.kron(cells, np.ones((8, 8, 1)))
    return big[:height, :width].astype(np.uint8)


def write_json(path: Path, classes: list, images: list) -> None:
    path.write_text(json.dumps({"classes": classes, "images": images}))


def tree(root: Path, num_train: int = 10, num_val: int = 5) -> ConfigDict:
    """train.json and val.json with three classes; image i of a split is grey level i.

    Returns the config that reads them.
    """
    for split, count in (("train", num_train), ("val", num_val)):
        (root / split).mkdir(parents=True)
        images = []
        for i in range(count):
            name = f"{split}/{i}.png"
            grey = np.full((16, 16, 3), i, np.uint8)
            (root / name).write_bytes(encode(grey, "PNG"))
            images.append([name, [c for j, c in enumerate("abc") if i >> j & 1]])
        write_json(root / f"{split}.json", list("abc"), images)
    return data_config(root)
