"""Networks of one layer, their files and runs, for tests of weights in and out."""

import functools

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from test_label_graph import some_graph

from mljax import checkpoint, import_weights, losses
from mljax.config import common
from mljax.label_graph_data import LabelGraph
from mljax.models import (
    build_model,
    import_torch,
)
from mljax.models.batch_norm import BatchNorm
from mljax.models.functional import split
from mljax.models.layers import Conv


class Small(nnx.Module):
    """A network of one layer, with the attributes of a backbone."""

    num_features, head_activation = 12, "relu"

    def __init__(self, hidden, classifier, *, rngs, **options):
        self.conv1 = Conv(3, 12, 3, stride=8, rngs=rngs)
        self.bn1 = BatchNorm(12)
        self.head_hidden, self.classifier = hidden, classifier

    def __call__(self, images, train=False, rngs=None):
        return jax.nn.relu(self.bn1(self.conv1(images), train))


SMALL = {  # as MobileNetV3's and ResNet's last layers
    "small_mobile": functools.partial(Small, 8, "classifier"),
    "small_resnet": functools.partial(Small, 0, "fc"),
}


def config_of(backbone: str, head: str, loss: str, **changed):
    """A config; changed: options of the head."""
    config = common()
    config.model.backbone, config.model.head, config.loss.name = backbone, head, loss
    config.model.ml_decoder.dim = 16
    if changed:
        config.model[head].update(changed)
    return config


def model_of(
    backbone: str, head: str, loss: str, classes: int, seed: int = 0, **changed
):
    """A random model; label graphs and classes are of the seed too."""
    graph = None
    if head in ("gcn", "gat"):
        given = some_graph(classes, seed)
        arrays = given["adjacency"], given["embeddings"]
        graph = LabelGraph(list(map(str, range(classes))), *arrays, 0.4, [])
    return build_model(
        config_of(backbone, head, loss, **changed).model,
        classes,
        angular=losses.is_angular(loss),
        rngs=nnx.Rngs(seed),
        graph=graph,
    )


def timm_file(folder, backbone: str, classes: int = 10, **more):
    """A file as timm's, and its tensors."""
    state = import_torch.export(model_of(backbone, "linear", "bce", classes, seed=5))
    state = {k: np.array(v, order="C") for k, v in state.items()} | more
    save_file(state, folder / f"{backbone}.safetensors")
    return folder / f"{backbone}.safetensors", state


def call(capsys, *arguments) -> str:
    """Runs the command; what it printed. Errors are one line."""
    code = import_weights.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == (1 if err else 0)
    if err:
        assert err.startswith("error: ") and err.count("\n") == 1
    return err or out


def save_run(folder, backbone: str, head: str, loss: str, classes: int = 7, **changed):
    """A work directory as training leaves it."""
    model = model_of(backbone, head, loss, classes, seed=5, **changed)
    params, batch_stats = split(model)
    about = {
        "config": config_of(backbone, head, loss, **changed).to_dict(),
        "class_names": [f"class {i}" for i in range(classes)],
    }
    saves = checkpoint.Checkpoints(folder / "best")
    saves.save(3, {"params": params, "batch_stats": batch_stats}, about)
    saves.close()
    return model


def same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
