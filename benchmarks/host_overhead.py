"""What a training step costs on the host, beside the compiled program itself.

python benchmarks/host_overhead.py [--steps 500]

Trains a tiny network (two dense layers on 8 x 8 pictures held in memory) the way
`mljax.train` does: next batch, to the device, step, metrics of the step before. Then
calls the same compiled step on one batch that is already on the device. Prints the
medians of both, and of their difference, as JSON.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf

from mljax import backend, losses, optim, preemption, sharding, speed, step
from mljax.config import common
from mljax.data import augment, pipeline
from mljax.data.source import Source
from mljax.progress import Progress

SIZE, CLASSES, BATCH = 8, 10, 16


def source(count: int = 4096) -> Source:
    draw = np.random.default_rng(0)
    images = tf.constant(draw.integers(0, 255, (count, SIZE, SIZE, 3), np.uint8))
    return Source(
        class_names=[str(i) for i in range(CLASSES)],
        labels=draw.integers(0, 2, (count, CLASSES)).astype(np.int8),
        names=[str(i) for i in range(count)],
        read=lambda i: tf.gather(images, i),
        split="train",
    )


def apply(params, batch_stats, images, *, train=False, rng=None):
    x = images.reshape(images.shape[0], -1)
    return jnp.tanh(x @ params["one"]) @ params["two"], batch_stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    backend.compute_inline()
    config = common()
    config.data.image_size = SIZE
    draw = np.random.default_rng(0)
    params = {
        "one": draw.standard_normal((SIZE * SIZE * 3, 32)).astype(np.float32) / 16,
        "two": draw.standard_normal((32, CLASSES)).astype(np.float32) / 6,
    }
    mesh = sharding.make_mesh()
    optimizer = optim.make_optimizer(config.optim, BATCH, 10 * steps, params)
    state = step.create_state(params, {}, optimizer, use_ema=True)
    places = sharding.state_sharding(state, mesh)
    state = sharding.place(state, places)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    train_step = jax.jit(
        step.make_train_step(
            apply,
            losses.bce,
            optimizer,
            augment.make_augment(flip=0.5),
            reduction="sum",
            seed=0,
            sam_rho=0.05,
            ema_decay=0.99,
        ),
        in_shardings=(places, rows),
        out_shardings=(places, whole),
        donate_argnums=0,
    )
    batches = pipeline.train_batches(
        source(), data_config=config.data, batch_size=BATCH, seed=0
    )
    clock = speed.Speed(BATCH)
    batches = clock.timed(batches)
    profiler = speed.Profiler("", Path())
    watch = preemption.Watch()
    progress = Progress()
    loop, bare = [], []
    previous = None
    for at in range(steps + 20):
        begun = time.perf_counter()
        profiler.before(at)
        batch = next(batches)
        progress.unreadable.update(batch["index"][~batch["ok"]])
        arrays = {name: batch[name] for name in ("image", "labels")}
        state, metrics = train_step(state, sharding.global_batch(arrays, rows))
        clock.dispatched(metrics)
        if previous is not None:
            progress.take(sharding.fetch(previous), 10)
        previous = metrics
        clock.step()
        profiler.after(at, metrics)
        watch.asked(at)
        loop.append(time.perf_counter() - begun)
    arrays = sharding.global_batch(arrays, rows)
    for _ in range(steps + 20):
        begun = time.perf_counter()
        state, metrics = train_step(state, arrays)
        jax.block_until_ready(metrics)
        bare.append(time.perf_counter() - begun)
    # The first ones compile and fill the caches.
    medians = [1e3 * statistics.median(times[20:]) for times in (loop, bare)]
    result = {
        "steps": steps,
        "loop_ms": round(medians[0], 3),
        "bare_call_ms": round(medians[1], 3),
        "overhead_ms": round(medians[0] - medians[1], 3),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
