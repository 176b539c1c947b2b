"""Counts of labels and images, as a tree of plain values: what report.json holds."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mljax.data.inspect_images import HUGE, TINY, ImageFacts
from mljax.data.source import Source
from mljax.label_graph_data import cooccurrence

_STRONGEST = 20  # pairs of labels
_WEIGHTS = 0.2, 5.0  # the smallest and the largest that is suggested


def split_counts(source: Source) -> dict[str, Any]:
    """Images and labels of one split."""
    positive = source.labels == 1
    per_image = positive.sum(1)
    histogram = Counter(per_image.tolist())
    return {
        "images": len(source),
        "labels": int(positive.sum()),
        "labels_per_image": float(per_image.mean()),
        "images_by_number_of_labels": {str(k): histogram[k] for k in sorted(histogram)},
        "images_without_labels": histogram[0],
        "images_known_to_have_no_label": int((source.labels == 0).all(1).sum()),
        "unknown_labels": int((source.labels == -1).sum()),
        "images_with_unknown_labels": int((source.labels == -1).any(1).sum()),
        "classes_without_positives": source.never_present(),
        "classes_without_negatives": source.never_absent(),
        "notes": list(source.notes),
    }


def class_counts(sources: Mapping[str, Source]) -> list[dict[str, Any]]:
    """For each class, in each split: positives, unknown, and the share of positives
    among the images in which it is known (None where it is known in none)."""
    names = next(iter(sources.values())).class_names
    rows: list[dict[str, Any]] = [{"name": name} for name in names]
    for split, source in sources.items():
        positives, unknown = (source.labels == 1).sum(0), (source.labels == -1).sum(0)
        for row, p, u in zip(rows, positives.tolist(), unknown.tolist(), strict=True):
            known = len(source) - u
            share = p / known if known else None
            row[split] = {"positives": p, "unknown": u, "share": share}
    return rows


def class_weights(train: Source) -> dict[str, float]:
    """A weight for each class's loss: the rarer the label, the larger.

    1 / sqrt(share of the images in which the label is known that have it), scaled to a
    mean of 1, then limited to 0.2 to 5. A label without a positive counts as if it had
    one. The square root keeps labels of a few images from ruling the loss.
    """
    positives = np.maximum(1, (train.labels == 1).sum(0))
    known = np.maximum(1, (train.labels != -1).sum(0))
    weights = 1 / np.sqrt(positives / known)
    weights = np.clip(weights / weights.mean(), *_WEIGHTS)
    return dict(zip(train.class_names, weights.round(4).tolist(), strict=True))


def strongest_pairs(train: Source) -> list[dict[str, Any]]:
    """The pairs of labels with the highest P(j | i)."""
    p = cooccurrence(train.labels)
    order = np.argsort(-p, axis=None, kind="stable")[:_STRONGEST]
    pairs = [divmod(int(k), len(p)) for k in order if p.flat[k] > 0]
    names = train.class_names
    return [{"of": names[i], "have": names[j], "share": p[i, j]} for i, j in pairs]


def image_counts(source: Source, facts: Sequence[ImageFacts]) -> dict[str, Any]:
    """Sizes, unreadable, tiny, huge and unusual images of one split."""
    readable = [f for f in facts if not f.reason]
    sizes: dict[str, Any] = {}
    if readable:
        heights = np.array([f.height for f in readable])
        widths = np.array([f.width for f in readable])
        sizes = {
            name: [int(np.min(v)), int(np.median(v)), int(np.max(v))]
            for name, v in (
                ("height", heights),
                ("width", widths),
                ("shorter_side", np.minimum(heights, widths)),
            )
        }
    unusual = defaultdict(list)
    for name, f in zip(source.names, facts, strict=True):
        for trait in f.traits:
            unusual[trait].append(name)

    def sized(test: Any) -> list[dict[str, Any]]:
        return [
            {"name": name, "height": f.height, "width": f.width}
            for name, f in zip(source.names, facts, strict=True)
            if not f.reason and test(f)
        ]

    return {
        "sizes_min_median_max": sizes,
        "unreadable": [
            {"name": name, "reason": f.reason}
            for name, f in zip(source.names, facts, strict=True)
            if f.reason
        ],
        "tiny": sized(lambda f: min(f.height, f.width) < TINY),
        "huge": sized(lambda f: f.height * f.width > HUGE),
        "unusual": dict(sorted(unusual.items())),
    }


def duplicates(
    sources: Mapping[str, Source], facts: Mapping[str, Sequence[ImageFacts]]
) -> list[dict[str, Any]]:
    """Groups of images with the same content, those over several splits first.

    `labels_differ`: some label is present in one and absent in another.
    """
    places = defaultdict(list)
    for split, found in facts.items():
        for i, f in enumerate(found):
            if not f.reason:
                places[f.key].append((split, i))
    groups = []
    for group in places.values():
        if len(group) == 1:
            continue
        rows = np.stack([sources[split].labels[i] for split, i in group])
        differ = ((rows == 1).any(0) & (rows == 0).any(0)).any()
        images = [{"split": s, "name": sources[s].names[i]} for s, i in group]
        splits = sorted({split for split, _ in group})
        groups.append(
            {"splits": splits, "labels_differ": bool(differ), "images": images}
        )
    return sorted(groups, key=lambda g: (-len(g["splits"]), -len(g["images"])))
