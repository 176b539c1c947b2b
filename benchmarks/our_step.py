"""mljax's side of the benchmarks: models with random weights, batches, the step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mljax import decision, losses, models, optim, predict, speed, step
from mljax.config import common
from mljax.data import augment
from mljax.label_graph_data import LabelGraph
from mljax.models import import_torch
from mljax.models.functional import as_function, split


def settings(backbone: str, head: str = "linear", size: int = 224) -> Any:
    """The config of the paper's loss (AAM, s = 17)."""
    config = common()
    config.model.backbone, config.model.head = backbone, head
    config.data.image_size = size
    config.loss.aam.scale = 17.0
    return config


def build(config: Any, classes: int, dtype: str = "float32") -> Any:
    """The model of a config, for AAM; the same weights every time.

    A label graph has an edge for every other label on average, as those of VOC, COCO
    and NUS-WIDE at tau = 0.4 (5 to 129 edges for 20 to 81 labels).
    """
    graph = None
    if config.model.head in ("gcn", "gat"):
        rng = np.random.default_rng(0)
        edges = (rng.random((classes, classes)) < 0.5 / classes).astype(np.float32)
        np.fill_diagonal(edges, 0)
        vectors = rng.normal(0, 0.4, (classes, 300)).astype(np.float32)
        names = [str(i) for i in range(classes)]
        graph = LabelGraph(names, edges, vectors, config.model.graph.tau, [])
    return models.build_model(
        config.model,
        classes,
        angular=True,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(0),
        graph=graph,
    )


def write_weights(folder: Path, model: Any, head: str) -> None:
    """For the peer, which finds them by the head's name."""
    np.savez(folder / f"weights-{head}.npz", **import_torch.export(model))


def draw_batch(batch: int, size: int, classes: int) -> dict[str, np.ndarray]:
    """Random pictures, uint8, and labels."""
    draw = np.random.default_rng(0)
    return {
        "image": draw.integers(0, 255, (batch, size, size, 3), np.uint8),
        "labels": draw.integers(0, 2, (batch, classes)).astype(np.int8),
    }


def loss(config: Any, model: Any, batch: dict[str, np.ndarray]) -> float:
    """Of the batch, in training, without SAM; `model` must have no dropout."""
    params, stats = split(model)
    apply, loss_fn = as_function(model), losses.make_loss(config.loss)

    @jax.jit
    def first(params: Any, stats: Any, images: Any, labels: Any) -> jax.Array:
        outputs, _ = apply(params, stats, augment.normalise(images), train=True)
        return loss_fn(outputs, labels)

    return float(first(params, stats, batch["image"], batch["labels"]))


def map_of(model: Any, images: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """What the head gets for images of this shape."""
    shape = jax.ShapeDtypeStruct(images, jnp.float32)
    params, stats = split(model.backbone)
    return jax.eval_shape(as_function(model.backbone), params, stats, shape)[0]


class Head:
    """Forward and backward of the head alone, on one map that stays on the device."""

    def __init__(
        self,
        config: Any,
        model: Any,
        fmap: Any,
        labels: Any,
        kind: Any = jnp.float32,
    ):
        apply, loss_fn = as_function(model.head), losses.make_loss(config.loss)

        def loss(
            params: Any, fmap: Any, stats: Any, labels: Any, rng: Any, train: bool
        ) -> jax.Array:
            outputs, _ = apply(params, stats, fmap, train=train, rng=rng)
            return loss_fn(outputs, labels)

        params, stats = split(model.head)
        fmap, labels = jnp.asarray(fmap, kind), jnp.asarray(labels)
        self.arrays = params, fmap, stats, labels, jax.random.key(0)
        self.plain = jax.jit(partial(loss, train=False))
        self.both = jax.jit(jax.value_and_grad(partial(loss, train=True), (0, 1)))

    def loss(self) -> float:
        """Without dropout."""
        return float(self.plain(*self.arrays))

    def step(self) -> None:
        jax.block_until_ready(self.both(*self.arrays))


def batch_shapes(batch: int, size: int, classes: int) -> dict[str, Any]:
    """Of `draw_batch`, without drawing it."""
    return {
        "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((batch, classes), jnp.int8),
    }


def prepared(config: Any, model: Any, images: int) -> tuple[step.TrainState, Any]:
    """The first state, and the jitted step with SAM, SGD and EMA."""
    params, stats = split(model)
    optimizer = optim.make_optimizer(config.optim, images, 1000, params)
    state = step.create_state(params, stats, optimizer, use_ema=True)
    train_step = step.make_train_step(
        as_function(model),
        losses.make_loss(config.loss),
        optimizer,
        augment.make_augment(),
        reduction="sum",
        seed=0,
        sam_rho=0.05,
        ema_decay=0.9997,
    )
    return state, jax.jit(train_step, donate_argnums=0)


class Training:
    """The compiled training step, on one batch that stays on the device."""

    def __init__(self, config: Any, model: Any, batch: dict[str, np.ndarray]):
        self.state, train_step = prepared(config, model, len(batch["image"]))
        self.batch = jax.tree.map(jnp.asarray, batch)
        self.flops = speed.mean_flops([train_step], self.state, self.batch)
        self.compiled = train_step.lower(self.state, self.batch).compile()

    def facts(self) -> dict[str, Any]:
        """Of the device: its kind, and where they are known its peak and how much of
        its memory was used at most; and the FLOPs of a step."""
        (device,) = jax.tree.leaves(self.batch)[0].devices()
        found = {"device": device.device_kind, "gflop": self.flops / 1e9}
        if peak := speed.peak_of(device):
            found["peak_tflops"] = peak / 1e12
        memory = device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["peak_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
        return found

    def step(self) -> float:
        """The loss of the second pass, once the step is done."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(metrics)
        return float(metrics["loss"])


def described(config: Any, classes: int) -> dict[str, Any]:
    """What a checkpoint says of a model."""
    names = [str(i) for i in range(classes)]
    return {"config": config.to_dict(), "class_names": names}


def predictor(
    config: Any, model: Any, classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images -> probabilities, both of numpy: the model as users have it, with
    the gate of a label graph folded away."""
    about, decided = described(config, classes), decision.default(classes)
    made = predict.from_model(models.folded(model), about, decided)
    return lambda images: np.asarray(made._run(images))
