"""Parts of a source: held out to choose the best epoch on, or those with a label."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from mljax.data.source import Source
from mljax.errors import UserError

_TAG = 0x5370_6C69_7400  # sets this use of the seed apart from the others


def labelled(source: Source) -> Source:
    """The images with at least one positive label, and a note on the others.

    Raises UserError where there is none.
    """
    keep = np.flatnonzero((source.labels == 1).any(1))
    if len(keep) == len(source):
        return source  # of shards, which were written without them
    if not len(keep):
        raise UserError(f"data.drop_unlabelled: no image of {source.split} has a label")
    note = f"{len(source) - len(keep)} of {len(source)} images have no label, left out"
    return replace(source.take(keep), notes=(*source.notes, note))


def carve(train: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """`train` as two sources: the larger part to train on and the part held out.

    Raises UserError where one of the two would be empty.
    """
    content = train.content() if train.content else range(len(train))
    kept, held = holdout(train.labels, content, fraction, seed)
    if len(kept) == 0 or len(held) == 0:
        raise UserError(
            f"data.holdout={fraction} of {len(train)} images leaves {len(kept)} to "
            f"train on and {len(held)} held out: choose another share"
        )
    return train.take(kept), train.take(held, "holdout")


def holdout(
    labels: np.ndarray, content: Sequence[Hashable], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits images so that every label has its share in both parts.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas: On the Stratification of
    Multi-Label Data, 2011, algorithm 1): the rarest label is dealt out first, each of
    its images to the part that still lacks most of that label. Images with the same
    content go together.

    Args:
        labels: [num_images, num_classes]; 1 is positive, anything else is not.
        content: a key for each image, the same for images that are to stay together.
        fraction: share of the images to hold out, in [0, 1].
        seed: of the choice among equals.

    Returns:
        (kept, held): sorted indices, int64.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must be in [0, 1]")
    key = np.array([seed % 2**64, _TAG], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    first_with: dict[Hashable, int] = {}
    group = np.array([first_with.setdefault(k, len(first_with)) for k in content], int)
    num_groups = len(first_with)
    size = np.bincount(group, minlength=num_groups)
    positives = np.zeros((num_groups, labels.shape[1]), np.int32)
    np.add.at(positives, group, labels == 1)
    left = positives.sum(0, dtype=np.int64)  # in groups that are not dealt yet

    share = np.array([1 - fraction, fraction])
    lacking = share * len(labels)  # images, [2]
    lacking_label = share[:, None] * left  # [2, num_classes]
    part = np.full(num_groups, -1)

    def deal(groups: np.ndarray, label: int | None) -> None:
        for g in rng.permutation(groups):
            # Most lacking of this label, then of images, then at random.
            want = lacking if label is None else lacking_label[:, label]
            best = np.flatnonzero(want == want.max())
            best = best[lacking[best] == lacking[best].max()]
            part[g] = p = best[0] if len(best) == 1 else rng.choice(best)
            lacking[p] -= size[g]
            lacking_label[p] -= positives[g]
            left[:] -= positives[g]

    while left.any():
        label = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
        deal(np.flatnonzero((part == -1) & (positives[:, label] > 0)), label)
    deal(np.flatnonzero(part == -1), None)
    return np.flatnonzero(part[group] == 0), np.flatnonzero(part[group] == 1)
