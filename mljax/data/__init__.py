"""Where images and labels come from. `DATASETS[data.name](config.data, seed)` gives
its images as `Sources`: train, val and, with data.holdout, holdout.
"""

import functools
import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

if TYPE_CHECKING:
    from mljax.data.source import Source, Sources


def _load(module: str, data_config: ConfigDict, seed: int) -> "Sources":
    # Imported here: TensorFlow takes seconds to import, and prediction needs none.
    from mljax.data import split
    from mljax.data.source import Sources

    load = importlib.import_module(f"mljax.data.{module}").load
    sources = load(data_config, seed)
    if data_config.drop_unlabelled:
        sources = {name: split.labelled(source) for name, source in sources.items()}
    sources = {name: _counted(x, data_config.expected) for name, x in sources.items()}
    train, holdout = sources["train"], None
    if data_config.holdout:
        train, holdout = split.carve(train, data_config.holdout, seed)
    return Sources(train, sources["val"], holdout)


def _counted(source: "Source", expected: ConfigDict) -> "Source":
    """With a note where a known data set has other images than it should."""
    count = expected[source.split]
    if len(source.class_names) != expected.labels or len(source) == count or not count:
        return source
    note = (
        f"{len(source):,} images, not the {count:,} of the published data with "
        f"{expected.labels} labels (data.expected.{source.split})"
    )
    if note in source.notes:  # shards bring those of the files they were made of
        return source
    return replace(source, notes=(*source.notes, note))


DATASETS = {
    "annotations": functools.partial(_load, "annotations"),
    "coco": functools.partial(_load, "coco"),
    "voc": functools.partial(_load, "voc"),
    "table": functools.partial(_load, "table"),
    "nuswide": functools.partial(_load, "nuswide"),
    "vg500": functools.partial(_load, "vg500"),
    "shapes": functools.partial(_load, "shapes"),
    "shards": functools.partial(_load, "shards"),
    "tfds": functools.partial(_load, "tfds"),
}
