"""Weights of the classes: what the inspector suggests, what the loss does with them."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mljax import config as configs
from mljax import run
from mljax.data import inspect_labels
from mljax.losses import LOSSES


def test_suggestions_by_hand():
    def found(labels):
        labels = np.array(labels, np.int8)
        names = [f"{i}" for i in range(labels.shape[1])]
        source = SimpleNamespace(labels=labels, class_names=names)
        return list(inspect_labels.class_weights(source).values())

    # Of 4 images 3, of 2 that are known 1, and as if 1 of 4.
    roots = 1 / np.sqrt([3 / 4, 1 / 2, 1 / 4])
    labels = [[1, 1, 0], [1, 0, 0], [1, -1, 0], [0, -1, 0]]
    assert found(labels) == pytest.approx(roots / roots.mean(), abs=1e-4)
    assert found([[1, 0]] * 10_000) == pytest.approx([0.2, 2 / 1.01], abs=1e-4)


def test_each_goes_to_the_class_of_its_name(tmp_path):
    config = configs.common()
    config.loss.name, config.loss.reduction = "bce", "sum"
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"b": 3.0, "a": 1.0}))  # by name, in any order
    config.loss.class_weights = str(file)
    loss = run.make_loss(config, ["a", "b"])
    outputs, labels = jnp.zeros((1, 2)), jnp.array([[1, -1], [-1, 1]])
    a, b = (float(loss(outputs, row[None])) for row in labels)
    alone = float(LOSSES["bce"](outputs, labels[:1], reduction="sum"))
    assert a == pytest.approx(alone) and b == pytest.approx(3 * alone)
