"""Batches as a function of (seed, step): index, read, decode, resize, batch.

Which images a step sees, and in which order, follows from (seed, step) alone. So a
run resumes from one integer, on any number of hosts, and an image that cannot be
read changes nothing but its own row. uint8 leaves this room; normalising and the
flip belong to the device.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from mljax.data.source import Source
from mljax.errors import UserError

Batch = dict[str, np.ndarray]

_PADDING = -1  # the index of a row that holds no image


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

    Every epoch is a new permutation of the images; its last incomplete batch is
    dropped. Process p of n gets rows p * b to (p + 1) * b of each global batch, with
    b = batch_size / n.

    Args:
        source: the images.
        data_config: `config.data`; image_size, antialias, on_error and prefetch are
            read.
        batch_size: images in a step, over all processes.
        seed: of the order.
        start_step: the first step to give; any step starts equally fast.
        process_index: this process.
        process_count: number of processes; divides batch_size.

    Returns:
        An iterator of {"image": uint8 [b, size, size, 3], "labels": int8
        [b, num_classes], "index": int64 [b] (row of the source), "ok": bool [b]}. With
        on_error "skip" an unreadable image has a black picture, labels -1, ok False.

    Raises:
        UserError: there are fewer images than batch_size; and, from the iterator with
            on_error "stop", an image cannot be read.
    """
    per_epoch = steps_per_epoch(len(source), batch_size)
    part = _rows_of_process(batch_size, process_index, process_count)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return permutation(len(source), seed, epoch)

    def rows(step: int) -> np.ndarray:
        epoch, step = divmod(step, per_epoch)
        return order(epoch)[step * batch_size : (step + 1) * batch_size][part]

    return _stream(source, rows, start_step, None, data_config)


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

    def rows(step: int) -> np.ndarray:
        index = np.arange(step * batch_size, (step + 1) * batch_size)[part]
        return np.where(index < len(source), index, _PADDING)

    for batch in _stream(source, rows, 0, num_batches, data_config):
        yield batch | {"mask": batch["index"] != _PADDING}


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in an epoch. Raises UserError where there is none."""
    if num_images < batch_size:
        raise UserError(
            f"batch_size={batch_size} is more than the {num_images} training images: "
            "lower batch_size"
        )
    return num_images // batch_size


def permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in an epoch, int64 [num_images]."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_images)


def _rows_of_process(batch_size: int, index: int, count: int) -> slice:
    if batch_size % count or not 0 <= index < count:
        raise ValueError(
            f"process {index} of {count}: batch_size={batch_size} must be a multiple "
            "of the number of processes"
        )
    return slice(index * batch_size // count, (index + 1) * batch_size // count)


def _stream(
    source: Source,
    rows: Callable[[int], np.ndarray],
    start: int,
    stop: int | None,
    data_config: ConfigDict,
) -> Iterator[Batch]:
    """Batches of steps start to stop; `rows(step)` gives the indices of a step.

    TensorFlow says neither which image failed nor goes on in step after a failure. But
    the images of the step are known, so on a failure they are read one at a time, and
    the pipeline starts anew behind that step. Until then both policies cost nothing.
    """
    if data_config.on_error not in ("stop", "skip"):
        raise UserError(f"data.on_error={data_config.on_error!r}: choose stop or skip")
    load = _loader(source, data_config)
    unreadable: set[int] = set()

    def readable_rows(step: int) -> np.ndarray:
        index = rows(step)
        return np.where(np.isin(index, list(unreadable)), _PADDING, index)

    step = start
    while stop is None or step < stop:
        images = _images(load, readable_rows, step, stop, data_config.prefetch)
        try:
            for image in images:
                yield _batch(source, image, rows(step), unreadable)
                step += 1
        except tf.errors.OpError:
            index = rows(step)
            image, reasons = _one_by_one(load, readable_rows(step))
            if data_config.on_error == "stop" and reasons:
                first, reason = next(iter(reasons.items()))
                raise UserError(
                    f"{source.names[first]}: cannot be read ({reason}); replace it, "
                    "take it off the list or set data.on_error=skip"
                ) from None
            unreadable.update(reasons)
            yield _batch(source, image, index, unreadable)
            step += 1


def _batch(
    source: Source, image: np.ndarray, index: np.ndarray, unreadable: set[int]
) -> Batch:
    ok = ~np.isin(index, list(unreadable))
    is_known = ok & (index != _PADDING)
    labels = np.where(is_known[:, None], source.labels[index], np.int8(-1))
    return {"image": image, "labels": labels, "index": index, "ok": ok}


def _loader(source: Source, data_config: ConfigDict) -> Callable:
    """index (int64 scalar tensor) -> uint8 [size, size, 3]; black for `_PADDING`."""
    size = data_config.image_size

    def read(index: tf.Tensor) -> tf.Tensor:
        image = source.read(index)
        is_sized = tf.reduce_all(tf.shape(image)[:2] == size)
        return tf.cond(is_sized, lambda: image, lambda: resize(image))

    def resize(image: tf.Tensor) -> tf.Tensor:
        image = tf.image.resize(
            image, [size, size], "bilinear", antialias=data_config.antialias
        )
        return tf.saturate_cast(tf.round(image), tf.uint8)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([], tf.int64)])
    def load(index: tf.Tensor) -> tf.Tensor:
        black = tf.zeros([size, size, 3], tf.uint8)
        image = tf.cond(index == _PADDING, lambda: black, lambda: read(index))
        return tf.ensure_shape(image, [size, size, 3])

    return load


def _images(
    load: Callable,
    rows: Callable[[int], np.ndarray],
    start: int,
    stop: int | None,
    prefetch: int,
) -> Iterator[np.ndarray]:
    """The pictures of each step from `start` on, uint8 [b, size, size, 3]."""
    batch_size = len(rows(start))
    threads = num_cpus()

    def indices(step: tf.Tensor) -> tf.data.Dataset:
        index = tf.numpy_function(rows, [step], tf.int64)
        return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(index, [batch_size]))

    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    # Threads of its own: XLA's computation and the reading do not queue for each other.
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    images = tf.data.Dataset.range(start, 2**62 if stop is None else stop)
    images = images.flat_map(indices).map(load, num_parallel_calls=threads)
    images = images.batch(batch_size, drop_remainder=True).prefetch(prefetch)
    return images.with_options(options).as_numpy_iterator()


def _one_by_one(load: Callable, index: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """The pictures of a step, black where unreadable, and {index: reason} of those."""
    images, reasons = [], {}
    for i in index:
        try:
            image = load(i)
        except tf.errors.OpError as error:
            image, reasons[int(i)] = load(_PADDING), _reason(error)
        images.append(image.numpy())
    return np.stack(images), reasons


def _reason(error: tf.errors.OpError) -> str:
    """The part of TensorFlow's message that is about the file, on one line."""
    message = re.sub(r"\{\{[^}]*\}\}|\[\[.*?\]\]|\[Op:\w+\]", "", error.message)
    asserted = re.search(r"assertion failed: \[(.*?)\]", message)
    return " ".join((asserted.group(1) if asserted else message).split())


def num_cpus() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
