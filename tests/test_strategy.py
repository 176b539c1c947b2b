"""The whole strategy in one run: mixing, freezing, a pair, stopped and resumed."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from runs import same_results

from mljax import checkpoint, config, models, train
from mljax.checkpoint import Checkpoints
from mljax.errors import UserError
from mljax.evaluate_workdir import evaluate_workdir
from mljax.models import pretrained
from mljax.models.batch_norm import BatchNorm
from mljax.models.blocks import Blocks
from mljax.models.layers import Conv
from mljax.run import make_run
from mljax.terminal import Terminal


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = Conv(8, 8, 3, padding=1, rngs=rngs)
        self.bn = BatchNorm(8)

    def __call__(self, x, train=False, rngs=None):
        return x + jax.nn.relu(self.bn(self.conv(x), train))


class Tiny(nnx.Module):
    num_features, head_hidden, head_activation = 8, 0, "relu"

    def __init__(self, *, rngs, **_):
        self.conv1 = Conv(3, 8, 8, stride=8, rngs=rngs)
        self.blocks = Blocks([Block(rngs) for _ in range(2)])

    def __call__(self, images, train=False, rngs=None):
        return self.blocks(self.conv1(images), train, rngs)


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", Tiny)
    settings = config.load("configs/shapes.py", "debug")
    settings.epochs = 3
    settings.batch_size = 16
    settings.data.update(num_train=64, num_val=32, mixup_alpha=0.5, cutmix_alpha=1.0)
    settings.model.update(backbone="tiny", dropout=0.1)
    settings.optim.update(name="adamw", freeze="backbone", freeze_epochs=1)
    settings.optim.layer_decay = 0.7
    settings.sam.rho = 0.0
    settings.mutual.weight = 100.0
    settings.eval.batch_size = 32
    settings.train.checkpoint_every = 3
    config.validate(settings)
    return settings


def frozen_part(state):
    """What the backbones are, parameters and statistics, as one vector."""
    trees = [
        state[kind][network]["backbone"]
        for kind in ("params", "batch_stats", "ema_params", "ema_batch_stats")
        for network in ("one", "two")
    ]
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(trees)])


def test_stopped_and_resumed_with_everything_on(
    settings, tmp_path, monkeypatch, capsys
):
    summary = train.train(settings, str(tmp_path / "whole"))
    said = capsys.readouterr().out
    for words in ("2 x tiny", "frozen for 1 epoch, then x 0.343", "network one"):
        assert words in said
    assert said.index("step 4/") < said.index("nothing is frozen") < said.index("p 5/")
    assert summary["best"]["network"] in ("one", "two")
    assert {"mAP_one", "mAP_two"} <= set(summary["last"])

    save, speak = Checkpoints.save, Terminal.step
    seen = {}

    def save_and_keep(self, step, state, about):
        save(self, step, state, about)
        self.wait()
        if self.folder.name == "checkpoints":
            tree = {k: getattr(state, k) for k in type(state).__dataclass_fields__}
            seen[step] = frozen_part(jax.device_get(tree))

    def stop(self, at, metrics, progress):
        if at == 8:
            raise KeyboardInterrupt
        speak(self, at, metrics, progress)

    monkeypatch.setattr(Checkpoints, "save", save_and_keep)
    monkeypatch.setattr(Terminal, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings, str(tmp_path / "run"))
    monkeypatch.setattr(Terminal, "step", speak)
    train.train(settings, str(tmp_path / "run"))
    assert "resumed at step 6" in capsys.readouterr().out
    same_results(tmp_path / "whole", tmp_path / "run")
    # Four steps are an epoch: until then the backbones stayed to the bit.
    np.testing.assert_array_equal(seen[3], seen[4])
    assert not np.array_equal(seen[4], seen[6])
    used(settings, tmp_path / "run", summary)


def used(settings, folder, summary):
    """`best/` holds one ordinary network."""
    evaluate_workdir(settings, str(folder))
    found = json.loads((folder / "eval.json").read_text())
    assert found["mAP"] == pytest.approx(summary["best"]["mAP"], abs=1e-6)
    step = checkpoint.find_best(folder)
    saved, about = checkpoint.load_variables(step)
    run = make_run(settings, about["class_names"])
    params, _, notes = pretrained.load(str(folder), run.make_model)
    jax.tree.map(np.testing.assert_array_equal, params, saved["params"])
    assert notes == []
    pair = folder / "checkpoints" / "12"
    with pytest.raises(UserError, match="two networks .* in best/"):
        pretrained.load(str(pair), run.make_model)
