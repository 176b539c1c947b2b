"""What is exported: from pixels to labels, as one function of weights and images."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mljax import __version__, decision
from mljax import config as configs
from mljax.data.augment import normalise
from mljax.decision import Decision
from mljax.errors import UserError
from mljax.images import sides_of
from mljax.models.fixed import fixed
from mljax.models.functional import as_function, split
from mljax.step import make_eval_step

FORMAT = 1  # of the description; raised when older code could not read it
INPUT, OUTPUTS = "images", ("probabilities", "labels")


class Program(NamedTuple):
    """A model for use, from pixels to labels.

    Attributes:
        function: (weights, images) -> (probabilities float32 [batch, num_classes],
            labels bool [batch, num_classes]); images uint8 [batch, height, width, 3].
        weights: nested dicts of arrays.
        about: a JSON description: class_names, image_size, decision, config ...
    """

    function: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    weights: dict[str, Any]
    about: dict[str, Any]

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        height, width = self.about["image_size"]
        return height, width


def make(model: Any, about: Mapping[str, Any], decided: Decision) -> Program:
    """The program of a module whose graph is folded (`models.folded`)."""
    config, model = configs.from_dict(about["config"]), fixed(model)
    params, batch_stats = split(model)
    outputs_of = make_eval_step(as_function(model), normalise, flip=config.eval.flip)

    def function(weights: Any, images: ArrayLike) -> tuple[jax.Array, jax.Array]:
        variables = weights["params"], weights["batch_stats"]
        outputs = outputs_of(*variables, jnp.asarray(images))
        p = decision.probabilities(outputs, config.loss, decided.calibration)
        return p, p > decided.thresholds

    described = {
        "format": FORMAT,
        "mljax": __version__,
        "class_names": list(about["class_names"]),
        "image_size": list(sides_of(config.data)),
        "resize": {key: config.data[key] for key in ("fit", "resize", "antialias")},
        "input": f"{INPUT}: uint8 [batch, height, width, 3], RGB",
        "outputs": "probabilities: float32, labels: bool (above the thresholds)",
        "decision": decision.to_json(about["class_names"], decided),
        "config": config.to_dict(),
    }
    weights = {"params": params, "batch_stats": batch_stats}
    return Program(function, weights, described)


def check(about: Any, path: Any) -> dict[str, Any]:
    """Raises UserError unless `about` is the description of an export."""
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise UserError(f"{path}: was not exported by mljax")
    if about["format"] > FORMAT:
        raise UserError(f"{path}: was exported by a newer mljax; upgrade mljax")
    return about
