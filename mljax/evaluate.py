"""A whole evaluation set, over all hosts, to exact metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mljax import metrics
from mljax.errors import UserError
from mljax.sharding import global_batch, to_host


class Scores(NamedTuple):
    """What a model says of every image, in the order of the source.

    Attributes:
        outputs: float32 `[num_images, num_classes]`, logits or cosines.
        labels: int8 `[num_images, num_classes]` in {1, 0, -1}.
        places: int64 `[num_images]`, the images' rows in the source.
        unreadable: those among them that could not be read.
    """

    outputs: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    unreadable: np.ndarray


def run(
    eval_step: Callable[[Any, Any, jax.Array], jax.Array],
    variants: Mapping[str, Mapping[str, Any]],
    batches: Iterable[Mapping[str, np.ndarray]],
    sharding: jax.sharding.NamedSharding,
    before_batch: Callable[[], None] | None = None,
) -> dict[str, Scores]:
    """Runs every variant over the batches, which are read once.

    Args:
        eval_step: (params, batch_stats, images) -> outputs `[batch, num_classes]`.
        variants: name -> {"params", "batch_stats"}.
        batches: of `data.pipeline.eval_batches`: this host's rows.
        sharding: of a batch.
        before_batch: called before each of them.

    Returns:
        name -> scores of all images of all hosts, each once, sorted by index.
    """
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("labels", "index", "mask", "ok")
    }
    for batch in batches:
        if before_batch:
            before_batch()
        arrays = global_batch(batch, sharding)
        # All variants are dispatched before the first one is waited for.
        running = {
            name: eval_step(v["params"], v["batch_stats"], arrays["image"])
            for name, v in variants.items()
        }
        for name, result in running.items():
            outputs[name].append(to_host(result))
        for name, rows in columns.items():
            rows.append(to_host(arrays[name]))
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    keep = np.flatnonzero(table["mask"])
    keep = keep[np.argsort(table["index"][keep], kind="stable")]
    index, ok = table["index"][keep], table["ok"][keep]
    labels = table["labels"][keep]
    return {
        name: Scores(_in_order(parts, keep), labels, index, index[~ok])
        for name, parts in outputs.items()
    }


def _in_order(parts: list[np.ndarray], keep: np.ndarray) -> np.ndarray:
    """The rows `keep` of all parts as one float32 table.

    The list is emptied: of many images with many labels there is one table in memory,
    and not a second one in parts.
    """
    rows = sum(len(part) for part in parts)
    table = np.empty((len(keep), parts[0].shape[1]), np.float32)
    places = np.full(rows, -1)
    places[keep] = np.arange(len(keep))
    parts.reverse()
    start = 0
    while parts:
        part = parts.pop()
        to = places[start : start + len(part)]
        table[to[to >= 0]] = part[to >= 0]
        start += len(part)
    return table


def unreadable(scores: Mapping[str, Scores], names: Sequence[str]) -> list[str]:
    """The names of the images that could not be read, those of `run`'s source."""
    return [names[i] for i in next(iter(scores.values())).unreadable]


_LOWEST = -1e30  # times a scale it is finite still
_BLOCK = 16_000_000  # outputs that a device makes probabilities of at a time


def report(scores: Scores, probabilities: Callable[[Any], Any]) -> dict[str, Any]:
    """The metrics of `mljax.metrics` on scores.

    Returns:
        mAP; CP, CR, CF1, OP, OR, OF1 (probability > 0.5); the same with "_top3" in
        their names for the three labels of each image with the highest scores (far
        apart even where float32 makes 1.0 of both probabilities); and "per_class":
        AP by column, None where a class has no positive. Outputs that are NaN count as
        the lowest; if there are some, "nan_images" says of how many images.

    Raises:
        UserError: no class has a positive among the images that could be read.
    """
    # Running statistics may lag behind weights that move fast, and the network then
    # overflows here alone: a bad epoch, and not the end of the run.
    outputs, nan_images = scores.outputs, 0
    if (is_nan := np.isnan(outputs)).any():
        outputs = np.where(is_nan, np.float32(_LOWEST), outputs)
        nan_images = int(is_nan.any(1).sum())
    ap = metrics.average_precision(outputs, scores.labels)
    if np.isnan(ap).all():
        raise UserError(
            "no image that can be read has a label, so there is no mAP to compute "
            f"({len(scores.unreadable)} of {len(scores.places)} images could not be "
            "read)"
        )
    p, step = np.empty_like(outputs), max(1, _BLOCK // outputs.shape[1])
    for start in range(0, len(p), step):
        p[start : start + step] = probabilities(outputs[start : start + step])
    top3 = metrics.classification_report(outputs, scores.labels, top_k=3)
    return {
        "mAP": float(np.mean(ap[~np.isnan(ap)])),
        **metrics.classification_report(p, scores.labels),
        **{f"{name}_top3": value for name, value in top3.items()},
        "per_class": [None if np.isnan(x) else float(x) for x in ap],
        **({"nan_images": nan_images} if nan_images else {}),
    }
