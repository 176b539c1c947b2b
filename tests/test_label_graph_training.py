"""The label graph in training: checkpoints, starting from another run, golden steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx
from small_model import identity
from test_label_graph import some_graph

from mljax import losses
from mljax.checkpoint import Checkpoints
from mljax.config import common
from mljax.models import Classifier, build_head, import_torch, pretrained
from mljax.models.batch_norm import BatchNorm
from mljax.models.functional import functional, merge, split
from mljax.models.label_graph import (
    threshold,
)
from mljax.models.layers import Conv
from mljax.optim import make_optimizer
from mljax.step import create_state, make_train_step

POOLS = ("avg", "max", "avg+max")
WEIGHTS = {"gcn": ("weight",), "gan": ("W", "a")}
HEAD = {"gcn": "gcn", "gan": "gat"}


class TinyBackbone(nnx.Module):
    """That of the reference's end-to-end trajectories."""

    def __init__(self, rngs):
        self.conv = Conv(3, 16, 3, stride=2, padding=1, rngs=rngs)
        self.bn = BatchNorm(16)

    def __call__(self, images, train=False, rngs=None):
        return jax.nn.silu(self.bn(self.conv(images), train))


def tiny_model(seed=0, **options):
    rngs = nnx.Rngs(seed)
    head = build_head("gcn", 16, 7, cosine=True, rngs=rngs, **options)
    return Classifier(TinyBackbone(rngs), head)


def test_a_checkpoint_brings_its_graph_along():
    model = tiny_model(seed=1, **some_graph())
    images = jnp.asarray(
        np.random.default_rng(0).standard_normal((2, 8, 8, 3)), "float32"
    )
    apply, _ = functional(tiny_model)  # no graph, embeddings of another length
    outputs, _ = apply(*split(model), images)
    np.testing.assert_array_equal(outputs, model(images))


def test_starting_from_another_run_keeps_the_own_graph(tmp_path):
    other = tiny_model(seed=1, **some_graph(seed=1))
    params, batch_stats = split(other)
    saved = Checkpoints(tmp_path)
    saved.save(3, {"params": params, "batch_stats": batch_stats}, {})
    saved.close()
    own = some_graph(seed=2)
    params, batch_stats, notes = pretrained.load(
        str(tmp_path), lambda: tiny_model(**own)
    )
    assert notes == []
    for name in ("gc1", "gc2", "head"):
        weight = getattr(other.head, name).weight[...]
        np.testing.assert_array_equal(params["head"][name]["weight"], weight)
    np.testing.assert_array_equal(batch_stats["head"]["inp"], own["embeddings"])
    A = threshold(own["adjacency"])
    np.testing.assert_allclose(batch_stats["head"]["A"], A, rtol=1e-6)


@pytest.mark.parametrize("layer", ["gcn", "gan"])
def test_training_trajectory_golden(layer):
    golden = np.load(shared("golden/optim.npz"))
    prefix = f"e2e_{layer}/"

    def recorded(kind, i):
        """Name (as `import_torch` has it) -> value after step i, if it was kept."""
        found = {}
        for key in golden:
            values = golden[key]
            if key.startswith(f"{prefix}{kind}/"):
                name = key.split("/", 2)[2].removeprefix("backbone.")
                if len(values) > 2 or i in (0, 6):
                    found[name] = values[i] if len(values) > 2 else values[min(i, 1)]
        return found

    def make():
        rngs = nnx.Rngs(0)
        head = build_head(
            HEAD[layer], 16, 20, cosine=True, attention_dropout=0.0, rngs=rngs
        )
        return Classifier(TinyBackbone(rngs), head)

    model = make()
    import_torch.load(model, recorded("traj", 0))
    params, stats = split(model)
    config = common().optim
    config.lr = 0.05
    optimizer = make_optimizer(config, 8, 12, params)
    state = create_state(params, stats, optimizer, use_ema=True)
    loss = partial(losses.aam, scale=17.0, margin=0.0, k=0.7)
    step = make_train_step(
        functional(make)[0],
        loss,
        optimizer,
        identity,
        reduction="sum",
        seed=0,
        sam_rho=0.05,
        ema_decay=0.9993,
    )
    step = jax.jit(step, donate_argnums=0)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    constants = {k: np.asarray(v) for k, v in stats["head"].items()}
    for i in range(6):
        images = golden["e2e/X"][i].transpose(0, 2, 3, 1)
        state, metrics = step(state, {"image": images, "labels": golden["e2e/Y"][i]})
        close(metrics["loss"], golden[f"{prefix}loss"][i])
        close(metrics["learning_rate"], golden[f"{prefix}lr"][i, 0])
        found = import_torch.export(merge(model, state.params, state.batch_stats))
        for name, value in recorded("traj", i + 1).items():
            close(found[name], value, err_msg=f"{name} after step {i}")
        averaged = merge(model, state.ema_params, state.ema_batch_stats)
        averaged = import_torch.export(averaged)
        for key in golden:
            if key.startswith(f"{prefix}ema/") and len(golden[key]) == 6:
                name = key.split("/", 2)[2].removeprefix("backbone.")
                close(averaged[name], golden[key][i], err_msg=f"EMA of {name}")
    # Never trained, decayed or averaged, to the last bit.
    for tree in (state.batch_stats, state.ema_batch_stats):
        for name, value in constants.items():
            np.testing.assert_array_equal(tree["head"][name], value)
