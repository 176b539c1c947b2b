"""A small data set of every source: `MAKERS[name](root)` gives its config.

Photos of several sizes, as JPEG and PNG, one of them unreadable (config.on_error is
"skip"); the source "shapes" draws its own.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import source_trees
import tensorflow as tf
import tensorflow_datasets as tfds
from data_trees import blocks, data_config, encode, write_json
from ml_collections import ConfigDict

from mljax.data import shard

CLASSES = ["ant", "bee", "cat"]
NUM_TRAIN, NUM_VAL = 12, 5


def files(count: int, seed: int) -> list[bytes]:
    forms = ["JPEG", "PNG"]
    sizes = [(40, 60), (64, 33), (30, 30)]
    return [
        encode(blocks(seed + i, *sizes[i % 3]), forms[i // 2 % 2]) for i in range(count)
    ]


def labels_of(i: int) -> list[str]:
    return [c for j, c in enumerate(CLASSES) if i >> j & 1]


def annotations(root: Path) -> ConfigDict:
    for split, count, seed in (("train", NUM_TRAIN, 0), ("val", NUM_VAL, 100)):
        (root / split).mkdir()
        images = []
        for i, data in enumerate(files(count, seed)):
            data = data[:-30] if (split, i) == ("train", 7) else data
            (root / split / f"é {i}").write_bytes(data)
            images.append([f"{split}/é {i}", labels_of(i), ["cat"] if i == 2 else []])
        write_json(root / f"{split}.json", CLASSES, images)
    return data_config(root, on_error="skip")


def shards(root: Path) -> ConfigDict:
    (root / "files").mkdir()
    annotations(root / "files")
    write_shards(root / "files", root / "shards")
    return data_config(root / "shards", name="shards", on_error="skip")


def write_shards(source: Path, output: Path, *flags: str) -> int:
    return shard.main(
        [
            "--config=configs/corel5k.py",
            f"--config.data.root={source}",
            "--config.data.on_error=skip",
            f"--output={output}",
            "--images-per-shard=5",
            *flags,
        ]
    )


def shapes(root: Path) -> ConfigDict:
    return data_config(name="shapes", num_train=NUM_TRAIN, num_val=NUM_VAL)


def tensorflow_datasets(root: Path) -> ConfigDict:
    def split(count: int, seed: int) -> tf.data.Dataset:
        def examples():
            for i in range(count):
                pixels = blocks(seed + i, 40, 60)
                yield {"image": pixels, "labels": [j for j in range(3) if i >> j & 1]}

        signature = {
            "image": tf.TensorSpec([40, 60, 3], tf.uint8),
            "labels": tf.TensorSpec([None], tf.int64),
        }
        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    label = tfds.features.ClassLabel(names=CLASSES)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="mine",
        version="1.0.0",
        data_dir=str(root),
        split_datasets={"train": split(NUM_TRAIN, 0), "test": split(NUM_VAL, 100)},
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "labels": tfds.features.Sequence(label),
            }
        ),
        disable_shuffling=True,
    )
    return data_config(root, name="tfds", tfds_name="mine", train="train", val="test")


def tree(name: str) -> Callable[[Path], ConfigDict]:
    """A maker of the layout of `source_trees`, with photos that differ."""

    def make(root: Path) -> ConfigDict:
        rows = [[i >> j & 1 for j in range(3)] for i in range(NUM_TRAIN)]
        labels = np.array(rows, np.int8)
        config = source_trees.write(name, root, labels, labels[:NUM_VAL])
        photos = sorted(p for p in root.rglob("*") if p.suffix in (".jpg", ".png"))
        for i, file in enumerate(photos):  # so large that no two crops are the same
            file.write_bytes(encode(blocks(i, 90, 120), "PNG"))
        config.on_error = "skip"
        return config

    return make


MAKERS = {
    "annotations": annotations,
    **{n: tree(n) for n in ("coco", "voc", "table", "nuswide", "vg500")},
    "shapes": shapes,
    "shards": shards,
    "tfds": tensorflow_datasets,
}


def augmented(config: ConfigDict) -> ConfigDict:
    """With what draws random numbers on the host; RandAugment, which takes a second to
    trace, for one source only. Two leave resizing to the device."""
    config.image_size = (24, 32)
    config.fit, config.crop_area, config.sampling = "crop", 0.3, "class_aware"
    config.randaugment.n = int(config.name == "annotations")
    config.resize_on_device = 40 if config.name in ("coco", "table") else 0
    return config
