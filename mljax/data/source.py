"""What every data source gives: labels, names, and a way to read image i."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# TensorFlow only reads and decodes; the accelerators belong to JAX.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")


@dataclass(frozen=True)
class Source:
    """A list of labelled images that is read by index.

    Attributes:
        class_names: the name of each label column.
        labels: int8 [num_images, num_classes]; 1 present, 0 absent, -1 unknown.
        names: for each image its path, or what else a person can find it by.
        read: int64 scalar tensor (the index) -> uint8 [height, width, 3]; traceable
            by tf.data. Raises a `tf.errors.OpError` where the image is unreadable.
        split: "train", "val" or "holdout".
        content: gives one key per image; two images with the same content have the
            same key. None: all images differ.
        encoded: int64 scalar tensor -> string scalar, the bytes of the image's file,
            of which `read` gives the pixels. None where there is no file.
        objects: uint16 [num_images, num_classes], how often a label stands in an image
            (once an object), where the source tells; else None.
        notes: what a person should know about what was read, a line each.
        unreadable: the images that could not be read so far; with on_error "skip" the
            pipeline notes them, and tries them once.
    """

    class_names: list[str]
    labels: np.ndarray
    names: list[str]
    read: Callable[[tf.Tensor], tf.Tensor]
    split: str
    content: Callable[[], Sequence[Hashable]] | None = None
    encoded: Callable[[tf.Tensor], tf.Tensor] | None = None
    objects: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    unreadable: set[int] = field(default_factory=set, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def never_present(self) -> list[str]:
        """The classes without a positive: they have no AP."""
        return self._classes(~(self.labels == 1).any(0))

    def never_absent(self) -> list[str]:
        """The classes with positives and no known negative: their AP is always 1."""
        return self._classes((self.labels == 1).any(0) & (self.labels != 0).all(0))

    def _classes(self, which: np.ndarray) -> list[str]:
        return [self.class_names[i] for i in np.flatnonzero(which)]

    def fingerprint(self) -> str:
        """Of class names, labels and file names, in order: other data has another one,
        the same data in another folder has the same."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        files = (PurePath(name).name for name in self.names)
        for text in (*self.class_names, *files):
            digest.update(text.encode(errors="backslashreplace") + b"\n")
        return digest.hexdigest()

    def take(self, indices: np.ndarray, split: str | None = None) -> "Source":
        """The images `indices` ([n] integers) as a source of their own, in that order.

        `split` names the new source, which has no notes; None keeps both.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise ValueError(f"indices must be in [0, {len(self)})")
        read, content, encoded = self.read, self.content, self.encoded
        rows = tf.constant(indices)

        count = len(self)  # this source, with its labels, is let go

        def taken() -> list[Hashable]:
            keys = content() if content else range(count)
            return [keys[i] for i in indices]

        return replace(
            self,
            labels=self.labels[indices],
            names=[self.names[i] for i in indices],
            read=lambda i: read(tf.gather(rows, i)),
            split=split or self.split,
            content=taken,
            encoded=encoded and (lambda i: encoded(tf.gather(rows, i))),
            objects=None if self.objects is None else self.objects[indices],
            notes=self.notes if split in (None, self.split) else (),
            unreadable=set(),
        )


class Sources(NamedTuple):
    """The images of a run; `holdout` is the part of train that chooses the epoch."""

    train: Source
    val: Source
    holdout: Source | None
