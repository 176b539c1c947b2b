"""Batches as a function of (seed, step): index, read, decode, resize, batch.

Which images a step sees, in which order, and the random numbers of each row follow
from (seed, step) alone. So a run resumes from one integer, on any number of hosts, and
an image that cannot be read changes nothing but its own row. uint8 leaves this room;
what is cheap there happens on the device (`augment`).
"""

import atexit
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mljax.data import decode, fit, order, randaugment
from mljax.data.source import Source
from mljax.errors import Temporary, UserError
from mljax.images import sides_of

Batch = dict[str, np.ndarray]

_PADDING = -1  # the index of a row that holds no image

_running: "weakref.WeakSet[Generator[Batch]]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """TensorFlow's threads ask Python for the rows of a step. Once Python is on its
    way out it ends threads that do so, and whoever waits for them waits for ever."""
    for batches in list(_running):
        with contextlib.suppress(ValueError):  # another thread is in it
            batches.close()


class Rows(NamedTuple):
    """This process's rows of a step: images int64 [b]; random, float32 [b, n]."""

    images: np.ndarray
    draws: np.ndarray


def train_batches(
    source: Source,
    *,
    data_config: ConfigDict,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches, from step `start_step` on.

    Every epoch is a new permutation of the images (or what `data.sampling` says); its
    last incomplete batch is dropped. Process p of n gets rows p * b to (p + 1) * b of
    each global batch, with b = batch_size / n.

    Args:
        source: the images.
        data_config: `config.data`.
        batch_size: images in a step, over all processes.
        seed: of the order and the augmentation.
        start_step: the first step to give; any step starts equally fast.
        process_index: this process.
        process_count: number of processes; divides batch_size.

    Returns:
        An iterator of {"image": uint8 [b, height, width, 3], "labels": int8
        [b, num_classes], "index": int64 [b] (row of the source), "ok": bool [b]}. With
        on_error "skip" an unreadable image has a black picture, labels -1, ok False.
        With resize_on_device the pictures are [b, canvas, canvas, 3], and "size" int32
        [b, 2] is the height and width of what lies in the upper left corner of each.

    Raises:
        UserError: there are fewer images than batch_size; and, from the iterator with
            on_error "stop", an image cannot be read.
    """
    per_epoch = steps_per_epoch(len(source), batch_size)
    part = _rows_of_process(batch_size, process_index, process_count)

    @functools.lru_cache(maxsize=2)
    def images_of(epoch: int) -> np.ndarray:
        if data_config.sampling == "class_aware":
            return order.class_aware(source.labels, seed, epoch)
        return order.permutation(len(source), seed, epoch)

    count = fit.NUM_DRAWS + randaugment.DRAWS * data_config.randaugment.n

    def rows(step: int) -> Rows:
        epoch, inside = divmod(step, per_epoch)
        index = images_of(epoch)[inside * batch_size : (inside + 1) * batch_size]
        draws = order.draws(seed, step, batch_size, count)[part]
        return Rows(index[part], fit.shape_crops(draws, data_config))

    batches = _stream(source, rows, start_step, None, data_config, train=True)
    _running.add(batches)
    return batches


def eval_batches(
    source: Source,
    *,
    data_config: ConfigDict,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every image once, in the order of the source.

    Arguments and batches as in `train_batches`, and "mask" bool [b]: False in the rows
    (black, labels -1, index -1, ok True) that fill up the last batch. Every process
    gets the same number of batches.
    """
    part = _rows_of_process(batch_size, process_index, process_count)
    num_batches = -(-len(source) // batch_size)

    def rows(step: int) -> Rows:
        index = np.arange(step * batch_size, (step + 1) * batch_size)[part]
        index = np.where(index < len(source), index, _PADDING)
        return Rows(index, np.zeros((len(index), 0), np.float32))

    batches = _stream(source, rows, 0, num_batches, data_config, train=False)
    _running.add(batches)
    for batch in batches:
        yield batch | {"mask": batch["index"] != _PADDING}


def for_step(batch: Batch) -> Batch:
    """What the training step takes of a batch."""
    return {name: batch[name] for name in ("image", "size", "labels") if name in batch}


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in an epoch. Raises UserError where there is none."""
    if num_images < batch_size:
        raise UserError(
            f"config.batch_size={batch_size} is more than the {num_images} training "
            "images: lower it"
        )
    return num_images // batch_size


def _rows_of_process(batch_size: int, index: int, count: int) -> slice:
    if batch_size % count or not 0 <= index < count:
        raise ValueError(
            f"process {index} of {count}: batch_size={batch_size} must be a multiple "
            "of the number of processes"
        )
    return slice(index * batch_size // count, (index + 1) * batch_size // count)


def _stream(
    source: Source,
    rows: Callable[[int], Rows],
    start: int,
    stop: int | None,
    data_config: ConfigDict,
    train: bool,
) -> Generator[Batch]:
    """Batches of steps start to stop; `train`: with augmentation.

    TensorFlow says neither which image failed nor goes on in step after a failure. But
    the images of the step are known, so on a failure they are read one at a time, and
    the pipeline starts anew behind that step. Until then both policies cost nothing.
    """
    if data_config.on_error not in ("stop", "skip"):
        raise UserError(f"data.on_error={data_config.on_error!r}: choose stop or skip")
    load = _loader(source, data_config, train)
    unreadable = set(source.unreadable) if data_config.on_error == "skip" else set()

    def readable_rows(step: int) -> Rows:
        index, draws = rows(step)
        index = np.where(np.isin(index, list(unreadable)), _PADDING, index)
        return Rows(index, draws)

    step = start
    while stop is None or step < stop:
        images = _images(load, readable_rows, step, stop, data_config)
        try:
            for pictures in images:
                yield _batch(source, pictures, rows(step).images, unreadable)
                step += 1
        except tf.errors.OpError:
            index = rows(step).images
            pictures, reasons = _one_by_one(
                load, readable_rows(step), data_config, source.names
            )
            if data_config.on_error == "stop" and reasons:
                first, reason = next(iter(reasons.items()))
                more = ", raise data.max_pixels" if "data.max_pixels" in reason else ""
                if data_config.name == "shards":
                    more = " and write the shards into a new folder" + more
                raise UserError(
                    f"{source.names[first]}: cannot be read ({reason}); replace it"
                    f"{more} or set data.on_error=skip (without it on the list it is a "
                    "new run)"
                ) from None
            unreadable.update(reasons)
            if 2 * len(reasons) <= len(index):  # else it is the disk, which may return
                source.unreadable.update(reasons)
            yield _batch(source, pictures, index, unreadable)
            step += 1


def _batch(
    source: Source, pictures: Batch, index: np.ndarray, unreadable: set[int]
) -> Batch:
    ok = ~np.isin(index, list(unreadable))
    is_known = ok & (index != _PADDING)
    labels = np.where(is_known[:, None], source.labels[index], np.int8(-1))
    return {**pictures, "labels": labels, "index": index, "ok": ok}


class _Loader(NamedTuple):
    """The two halves of reading an image, so that more files than CPUs can be waited
    for: (index) -> its bytes, or none where the source has no files; (index, bytes,
    draws) -> "image", uint8 [height, width, 3]; with a canvas, where pictures have
    sizes of their own, also "size", int32 [2]."""

    fetch: Callable[[tf.Tensor], tf.Tensor]
    prepare: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]

    def __call__(self, index: int, draws: np.ndarray) -> Batch:
        found = self.prepare(index, self.fetch(index), draws)
        return {name: value.numpy() for name, value in found.items()}


def _loader(source: Source, data_config: ConfigDict, train: bool) -> _Loader:
    """A padded row is black."""
    black = np.zeros((*sides_of(data_config), 3), np.uint8)
    canvas = data_config.resize_on_device if train else 0
    ops = data_config.randaugment
    prepare = fit.make_prepare(source, data_config, train)
    index_spec = tf.TensorSpec([], tf.int64)
    signature = [index_spec, tf.TensorSpec([], tf.string), tf.TensorSpec([None])]

    @tf.function(autograph=False, input_signature=[index_spec])
    def fetch(index: tf.Tensor) -> tf.Tensor:
        if source.encoded is None:
            return tf.constant(b"")
        encoded = source.encoded
        return tf.cond(index == _PADDING, lambda: b"", lambda: encoded(index))

    def picture(index: tf.Tensor, data: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        image = prepare(index, data, draws)
        if not train or not ops.n:
            return image
        draws = draws[fit.NUM_DRAWS :]
        return randaugment.randaugment(image, draws, n=ops.n, m=ops.m, prob=ops.prob)

    @tf.function(autograph=False, input_signature=signature)
    def load(
        index: tf.Tensor, data: tf.Tensor, draws: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        image = tf.cond(
            index == _PADDING, lambda: black, lambda: picture(index, data, draws)
        )
        if not canvas:
            return {"image": tf.ensure_shape(image, black.shape)}
        return {"image": image, "size": tf.shape(image)[:2]}

    return _Loader(fetch, load)


def _images(
    load: _Loader,
    rows: Callable[[int], Rows],
    start: int,
    stop: int | None,
    data_config: ConfigDict,
) -> Iterator[Batch]:
    """What `load` gives, for all rows of each step from `start` on."""
    first = rows(start)
    batch_size, num_draws = first.draws.shape
    threads = num_cpus()
    reads = data_config.parallel_reads or threads

    def of_step(step: tf.Tensor) -> tf.data.Dataset:
        index, draws = tf.numpy_function(rows, [step], [tf.int64, tf.float32])
        index = tf.ensure_shape(index, [batch_size])
        draws = tf.ensure_shape(draws, [batch_size, num_draws])
        return tf.data.Dataset.from_tensor_slices((index, draws))

    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    # Threads of its own: XLA's computation and the reading do not queue for each other.
    options.threading.private_threadpool_size = max(threads, reads)
    options.threading.max_intra_op_parallelism = 1
    images = tf.data.Dataset.range(start, 2**62 if stop is None else stop)
    images = images.flat_map(of_step)
    if reads != threads:
        images = images.map(
            lambda index, draws: (index, load.fetch(index), draws),
            num_parallel_calls=reads,
        ).map(load.prepare, num_parallel_calls=threads)
    else:
        images = images.map(
            lambda index, draws: load.prepare(index, load.fetch(index), draws),
            num_parallel_calls=threads,
        )
    if "size" in images.element_spec:
        # An eighth of the time of tf.pad, which writes pixel by pixel.
        canvas = data_config.resize_on_device
        sides = {"image": [canvas, canvas, 3], "size": [2]}
        images = images.padded_batch(batch_size, sides, drop_remainder=True)
    else:
        images = images.batch(batch_size, drop_remainder=True)
    return (
        images.prefetch(data_config.prefetch).with_options(options).as_numpy_iterator()
    )


def _one_by_one(
    load: _Loader, rows: Rows, data_config: ConfigDict, names: Sequence[str]
) -> tuple[Batch, dict[int, str]]:
    """The pictures of a step, black where unreadable, and {index: reason} of those.

    With on_error "stop" no more than one reason is looked for.

    Raises:
        Temporary: a file system does not answer, for half a minute.
    """
    pictures: list[Batch] = []
    reasons: dict[int, str] = {}
    pauses: Sequence[float] = decode.PAUSES
    for i, draws in zip(*rows, strict=True):
        if reasons and data_config.on_error == "stop":
            i = _PADDING
        try:
            read = functools.partial(load.__call__, i, draws)
            picture = decode.patiently(read, pauses)
        except decode.AWAY as error:
            raise Temporary(
                f"{names[i]}: cannot be read now ({decode.reason(error)}): is its disk "
                "there? The same command goes on from the last checkpoint"
            ) from None
        except tf.errors.OpError as error:
            picture, reasons[int(i)] = load(_PADDING, draws), decode.reason(error)
            if not isinstance(error, decode.OF_FILE):
                pauses = ()  # the next ones of this step are not waited for
        if "size" in picture:
            rest = data_config.resize_on_device - picture["size"]
            sides = [(0, rest[0]), (0, rest[1]), (0, 0)]
            picture["image"] = np.pad(picture["image"], sides)
        pictures.append(picture)
    stacked = {name: np.stack([p[name] for p in pictures]) for name in pictures[0]}
    return stacked, reasons


def num_cpus() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
