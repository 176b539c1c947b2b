"""Where images and labels come from. `DATASETS[data.name](config.data, seed)` gives
its images as `Sources`: train, val and, with data.holdout, holdout.
"""

import functools
import importlib
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

if TYPE_CHECKING:
    from mljax.data.source import Sources


def _load(module: str, data_config: ConfigDict, seed: int) -> "Sources":
    # Imported here: TensorFlow takes seconds to import, and prediction needs none.
    from mljax.data import split
    from mljax.data.source import Sources

    load = importlib.import_module(f"mljax.data.{module}").load
    sources = load(data_config, seed)
    train, holdout = sources["train"], None
    if data_config.holdout:
        train, holdout = split.carve(train, data_config.holdout, seed)
    return Sources(train, sources["val"], holdout)


DATASETS = {
    "annotations": functools.partial(_load, "annotations"),
    "shapes": functools.partial(_load, "shapes"),
    "tfds": functools.partial(_load, "tfds"),
}
