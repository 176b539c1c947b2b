"""What training and evaluation share: a config's model on its mesh."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mljax import config as configs
from mljax import (
    evaluate,
    finetune,
    label_graph_data,
    losses,
    models,
    mutual,
    sharding,
    step,
)
from mljax.data import DATASETS, augment, device_resize, pipeline
from mljax.data.source import Source, Sources
from mljax.errors import UserError
from mljax.label_graph_data import LabelGraph
from mljax.models.functional import as_function, functional, split


class Run(NamedTuple):
    """A config's model, placed on devices.

    Attributes:
        make_model: (seed = config.seed) -> the module with random weights.
        apply: see `models.functional`; of one network.
        eval_step: (params, batch_stats, images uint8) -> float32 outputs
            `[batch, num_classes]`, jitted over the mesh.
    """

    config: ConfigDict
    class_names: list[str]
    mesh: Mesh
    make_model: Callable[..., models.Classifier]
    apply: Callable[..., Any]
    eval_step: Callable[..., jax.Array]

    def scores(
        self,
        variants: dict[str, dict[str, Any]],
        source: Source,
        before_batch: Callable[[], None] | None = None,
    ) -> dict[str, evaluate.Scores]:
        """Name -> scores of all images of `source`, for each set of weights.

        `before_batch` is called before every batch, and may raise.
        """
        batches = pipeline.eval_batches(
            source,
            data_config=self.config.data,
            # Filled up with what does not count, as the last batch is.
            batch_size=configs.round_up(self.config.eval.batch_size, self.mesh.size),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        rows = sharding.batch_sharding(self.mesh)
        return evaluate.run(self.eval_step, variants, batches, rows, before_batch)

    @property
    def is_pair(self) -> bool:
        """Whether two networks are trained; they are evaluated one by one."""
        return self.config.mutual.weight > 0

    def train_apply(self, frozen: bool) -> Callable[..., Any]:
        """`apply` in training, of all networks; before or after the thaw."""
        apply, optim = self.apply, self.config.optim
        if frozen and optim.freeze_stats:
            apply, _ = functional(
                lambda: finetune.fix_batch_norm(self.make_model(), optim.freeze)
            )
        return mutual.pair(apply) if self.is_pair else apply

    def probabilities(self, outputs: Any) -> Any:
        return losses.probabilities(outputs, self.config.loss)


def check_names(config: ConfigDict) -> None:
    """Raises UserError, with the choices, for a name that is nobody's."""
    for key, name, known in (
        ("data.name", config.data.name, DATASETS),
        ("model.backbone", config.model.backbone, models.BACKBONES),
        ("model.head", config.model.head, models.HEADS),
        ("loss.name", config.loss.name, losses.LOSSES),
    ):
        if name not in known:
            choices = ", ".join(known)
            raise UserError(f"config.{key} = {name!r}: must be one of {choices}")


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The devices as `config.mesh` has them.

    Raises:
        UserError: the batch or the mesh does not fit the devices.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    configs.validate_devices(config, mesh.size)
    return mesh


def make_run(
    config: ConfigDict, class_names: list[str], graph: LabelGraph | None = None
) -> Run:
    """Builds the mesh and the model of `config`; `graph` as in `models.build_model`.

    Raises:
        UserError: as `make_mesh`.
    """
    mesh = make_mesh(config)

    def make_model(seed: int = config.seed) -> models.Classifier:
        model = models.build_model(
            config.model,
            len(class_names),
            angular=losses.is_angular(config.loss.name),
            dtype=jnp.dtype(config.dtype),
            rngs=nnx.Rngs(seed),
            graph=graph,
        )
        # SAM's groups are already apart when they reach the model.
        groups = config.model.batch_norm_groups // config.sam.groups
        if groups > 1:
            finetune.group_batch_norm(model, groups)
        return model

    apply, _ = functional(make_model)
    eval_step = _eval_step(config, mesh, apply)
    return Run(config, class_names, mesh, make_model, apply, eval_step)


def for_use(run: Run, variables: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """`run` and its weights with what is constant in use computed once.

    The scores are the same, see `models.folded`. Only for evaluation and export.
    """
    if run.config.model.head not in label_graph_data.HEADS:
        return run, variables  # tracing a deep network for nothing takes seconds
    graph, *_ = nnx.split(nnx.eval_shape(run.make_model), nnx.Param, nnx.BatchStat)
    model = nnx.merge(graph, variables["params"], variables["batch_stats"])
    folded = models.folded(model)
    apply = as_function(folded)
    run = run._replace(apply=apply, eval_step=_eval_step(run.config, run.mesh, apply))
    params, batch_stats = split(folded)
    return run, {"params": params, "batch_stats": batch_stats}


def _eval_step(
    config: ConfigDict, mesh: Mesh, apply: Callable[..., Any]
) -> Callable[..., jax.Array]:
    return jax.jit(
        step.make_eval_step(
            apply,
            augment.normalise,
            flip=config.eval.flip,
            mesh=sharding.gathered_on(mesh),
        ),
        out_shardings=sharding.batch_sharding(mesh),
    )


def make_augment(config: ConfigDict) -> step.Augment:
    """What `config.data` does to a training batch on the device."""
    data = config.data
    return augment.make_augment(
        flip=data.flip,
        cutout=data.cutout,
        cutout_side=data.cutout_side,
        jitter=data.jitter.to_dict(),
        mixup_alpha=data.mixup_alpha,
        cutmix_alpha=data.cutmix_alpha,
        mixup_prob=data.mixup_prob,
        mixup_switch_prob=data.mixup_switch_prob,
    )


def sized_batches(
    config: ConfigDict,
) -> Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]]:
    """On the device: training batches -> with all pictures of the model's size."""
    if not config.data.resize_on_device:
        return lambda batch: batch
    resize = device_resize.make_resize(config.data)

    def sized(batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        kept = {name: part for name, part in batch.items() if name != "size"}
        return {**kept, "image": resize(batch["image"], batch["size"])}

    return sized


def make_place(config: ConfigDict, mesh: Mesh) -> Callable[[Any], Any]:
    """Training batches of the pipeline -> on the devices, as a step takes them.

    Resizing is a program of its own: the step's is the same, to the last bit of what it
    computes, wherever the pictures got their size.
    """
    rows = sharding.batch_sharding(mesh)
    sized = sized_batches(config)
    if config.data.resize_on_device:
        sized = jax.jit(sized, out_shardings=rows)
    return lambda batch: sized(sharding.global_batch(pipeline.for_step(batch), rows))


def make_loss(config: ConfigDict, class_names: list[str]) -> Callable[..., jax.Array]:
    """The loss of `config.loss`, with the class weights of its file; of a pair with
    `config.mutual` what `mutual.make_loss` makes of it."""
    loss = losses.make_loss(config.loss, _class_weights(config, class_names))
    if not config.mutual.weight:
        return loss
    # Where the losses of parts of the batch are added up, each has its share of it.
    whole = config.batch_size if config.loss.reduction == "sum" else None
    scale = config.loss.aam.scale if losses.is_angular(config.loss.name) else 1.0
    return mutual.make_loss(loss, config.mutual.weight, scale, whole)


def data_keys(
    sources: Sources, config: ConfigDict, graph: LabelGraph | None
) -> dict[str, str]:
    """What tells the data of a run from other data, by what changed."""
    keys = {
        f"{name} images": source.fingerprint()
        for name, source in sources._asdict().items()
        if source is not None
    }
    if (weights := _class_weights(config, sources.train.class_names)) is not None:
        keys["class weights"] = _digest(weights)
    if graph is not None:
        keys["label graph"] = _digest(graph.cooccurrence)
        keys["label embeddings"] = _digest(graph.embeddings)
    return keys


def _digest(array: np.ndarray) -> str:
    exact = np.ascontiguousarray(array, np.float32)
    return hashlib.blake2b(exact.tobytes(), digest_size=16).hexdigest()


def _class_weights(config: ConfigDict, class_names: list[str]) -> np.ndarray | None:
    if not config.loss.class_weights:
        return None
    file = Path(config.loss.class_weights)
    try:
        weights = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"config.loss.class_weights = {file}: {error}; name the JSON file that "
            "python -m mljax.data.inspect wrote, or one like it"
        ) from error
    if not isinstance(weights, dict) or set(weights) != set(class_names):
        given = set(weights) if isinstance(weights, dict) else set()
        off = sorted(set(class_names) ^ given)
        raise UserError(
            f"config.loss.class_weights = {file}: must be an object with one number "
            f"for each of the {len(class_names)} classes; check {', '.join(off[:5])}"
        )
    values = [weights[name] for name in class_names]
    largest = float(np.finfo(np.float32).max)
    if not all(type(v) in (int, float) and 0 <= v <= largest for v in values):
        raise UserError(
            f"config.loss.class_weights = {file}: weights must be numbers from 0 on"
        )
    return np.asarray(values, np.float32)
