"""A network small enough to be compared step by step, its loss and its data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

ARRAYS = ("fc1.weight", "fc1.bias", "bn.weight", "bn.bias", "fc2.weight", "fc2.bias")
STATS = ("bn.running_mean", "bn.running_var")


def mlp(params, stats, x, *, train=False, rng=None, norm=True, dropout=0.0):
    """Linear, BatchNorm (as PyTorch's), ReLU, linear; weights are [out, in]."""
    x = x @ params["fc1"]["weight"].T + params["fc1"]["bias"]
    if norm and train:
        mean, var, n = x.mean(0), x.var(0), x.shape[0]
        old = stats["bn"]
        stats = {
            "bn": {
                "running_mean": 0.9 * old["running_mean"] + 0.1 * mean,
                "running_var": 0.9 * old["running_var"] + 0.1 * var * n / (n - 1),
            }
        }
    elif norm:
        mean, var = stats["bn"]["running_mean"], stats["bn"]["running_var"]
    if norm:
        x = (x - mean) / jnp.sqrt(var + 1e-5)
        x = x * params["bn"]["weight"] + params["bn"]["bias"]
    x = jax.nn.relu(x)
    if train and dropout:
        x = x * jax.random.bernoulli(rng, 1 - dropout, x.shape) / (1 - dropout)
    return x @ params["fc2"]["weight"].T + params["fc2"]["bias"], stats


def bce(outputs, labels):
    return -jnp.sum(
        labels * jax.nn.log_sigmoid(outputs)
        + (1 - labels) * jax.nn.log_sigmoid(-outputs)
    )


def identity(images, labels, rng):
    return images, labels


def nest(flat):
    tree = {}
    for name, value in flat.items():
        layer, leaf = name.split(".")
        tree.setdefault(layer, {})[leaf] = value
    return tree


def make(seed=0, features=6, hidden=8, classes=4):
    """Parameters and batch statistics of `mlp`, drawn in numpy."""
    rng = np.random.default_rng(seed)
    shapes = {
        "fc1.weight": (hidden, features),
        "fc1.bias": (hidden,),
        "bn.weight": (hidden,),
        "bn.bias": (hidden,),
        "fc2.weight": (classes, hidden),
        "fc2.bias": (classes,),
    }
    params = nest({k: 0.5 * rng.standard_normal(s) for k, s in shapes.items()})
    stats = nest({STATS[0]: np.zeros(hidden), STATS[1]: np.ones(hidden)})
    as_float32 = partial(jax.tree.map, lambda x: x.astype(np.float32))
    return as_float32(params), as_float32(stats)


def make_batch(seed=0, size=16, features=6, classes=4):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.standard_normal((size, features)).astype(np.float32),
        "labels": rng.integers(0, 2, (size, classes)).astype(np.float32),
    }
