"""Runs of one small training on several layouts of simulated devices.

python tests/layouts.py BACKBONE HEAD LAYOUT [plain] [parts]

compiles the step for 8 devices, with SAM, rematerialisation and accumulation, so that
XLA's warnings can be read; "plain": of the convolutions that accelerators are given,
"parts": without gathering the parameters first.
"""

import contextlib
import sys

import jax
import numpy as np
from ml_collections import ConfigDict

from mljax import config as configs
from mljax import results, sharding, train
from mljax.data import pipeline
from mljax.models import BACKBONES, cpu
from mljax.models.mobilenetv3 import MobileNetV3, _stages

# name -> (devices, mesh.data, mesh.fsdp)
LAYOUTS = {"1": (1, 1, 1), "8": (8, 8, 1), "fsdp": (8, 1, 8), "2x4": (8, 2, 4)}


def shallow(**options) -> MobileNetV3:
    """MobileNetV3 with one block, of 5x5 filters and a gate: quick to compile."""
    stages = _stages(kernel=5, squeeze=True, late="hard_swish")
    stages = [stages[1][:1]]
    return MobileNetV3(stages, "hard_swish", same=False, eps=1e-5, **options)


WARNING = "nvoluntary full rematerialization"


def config_for(backbone: str, head: str, **overrides) -> ConfigDict:
    config = configs.load("configs/shapes.py", "debug")
    config.model.backbone, config.model.head = backbone, head
    config.batch_size, config.eval.batch_size = 16, 16
    config.data.num_train, config.data.num_val = 64, 24  # val: one and a half batches
    config.model.ml_decoder.dim = 128
    config.model.ml_decoder.feedforward = 256
    config.model.ml_decoder.dropout = 0.0 if head == "linear" else 0.1
    config.optim.schedule, config.optim.lr = "constant", 1e-3
    config.sam.rho = 0.05
    for key, value in overrides.items():
        configs.override(config, key, str(value))
    return config


def setup(monkeypatch, config: ConfigDict, layout: str) -> train.Setup:
    """`train.setup` on a layout of LAYOUTS."""
    count, config.mesh.data, config.mesh.fsdp = LAYOUTS[layout]
    devices = jax.devices()[:count]
    with monkeypatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: devices)
        return train.setup(config)


def batches(made: train.Setup, config: ConfigDict):
    rows = sharding.batch_sharding(made.run.mesh)
    stream = pipeline.train_batches(
        made.sources.train,
        data_config=config.data,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    for batch in stream:
        arrays = {name: batch[name] for name in ("image", "labels")}
        yield sharding.global_batch(arrays, rows)


def trained(monkeypatch, config: ConfigDict, layout: str, steps: int, judged=True):
    """(losses [steps], final state as numpy, scores of all of val or {})."""
    made = setup(monkeypatch, config, layout)
    state, losses = made.initial(), []
    for at, batch in zip(range(1, steps + 1), batches(made, config), strict=False):
        before = state
        state, metrics = made.step_at(at)(before, batch, made.seed)
        losses.append(float(metrics["loss"]))
        # Every array is donated, and its successor lies where it lay.
        assert all(x.is_deleted() for x in jax.tree.leaves(before) if x.ndim)
    places = jax.tree.map(lambda x: x.sharding, state)
    assert places == jax.tree.map(lambda x: x.sharding, made.state)
    variants = results.variants(state, False) if judged else {}
    scores = made.run.scores(variants, made.judge)
    return np.array(losses), jax.tree.map(np.asarray, state), scores


def assert_same(one, other, tolerance: float) -> None:
    """Each array within `tolerance` of its largest entry."""

    def close(a, b):
        scale = max(1.0, float(np.abs(a).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)

    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(close, one, other)


def main(backbone: str, head: str, layout: str, *how: str) -> None:
    BACKBONES["shallow"] = shallow
    changes = {"model.remat": "true", "optim.accumulate": 2, "sam.rho": 0.05}
    config = config_for(backbone, head, **changes)
    _, config.mesh.data, config.mesh.fsdp = LAYOUTS[layout]
    if "parts" in how:
        sharding.gathered_on = lambda mesh: None
    made = train.setup(config)
    jax.config.update("jax_enable_compilation_cache", False)
    batch = next(batches(made, config))
    with cpu.plain_forms() if "plain" in how else contextlib.nullcontext():
        lowered = made.step_at(1).lower(made.state, batch, made.seed)
    lowered.compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
