"""Where in images their labels come from.

    from mljax import heatmaps

    model = heatmaps.load("runs/mine")  # a work directory or one saved step
    (found,) = model.heatmaps(["photo.jpg"])
    found.labels, found.probabilities  # the three likeliest
    found.upsampled()  # [3, height, width], over the photo

The methods are in `mljax.models.explain`. TensorFlow is not needed.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mljax import heatmap_pictures
from mljax.errors import UserError
from mljax.images import Box

if TYPE_CHECKING:
    from mljax.decision import Decision

BATCH = 8  # images computed at a time; their photos are held at full size


class Heatmaps(NamedTuple):
    """The maps of one image.

    Attributes:
        labels: of the maps, the likeliest first unless they were asked for by name.
        probabilities: float32 [num_labels].
        maps: float32 [num_labels, rows, columns], as coarse as the backbone's map.
            "cam": logits or cosines that average to the label's (with
            `eval.flip` those of the photo as it is); "attention": shares
            of 1; "gradcam": 0 or more.
        size: (height, width) of the photo.
        inside, part: how the photo lies under the maps, see `images.seen`.
    """

    labels: list[str]
    probabilities: np.ndarray
    maps: np.ndarray
    size: tuple[int, int]
    inside: Box
    part: Box

    def upsampled(self) -> np.ndarray:
        """The maps at the size of the photo: float32 [num_labels, height, width]."""
        place = self.size, self.inside, self.part
        return np.stack([heatmap_pictures.stretch(m, *place) for m in self.maps])


def load(checkpoint: str | Path) -> "Explainer":
    """The model of a work directory (then its best) or of one saved step.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of a newer version.
    """
    from mljax import checkpoint as checkpoints
    from mljax import decision
    from mljax.models import folded, pretrained

    step = checkpoints.find_best(Path(checkpoint).absolute())
    model, about = pretrained.restore(step)
    decided = decision.load(step, about["class_names"])
    return Explainer(folded(model), about, decided)


class Explainer:
    """A trained model that shows where its labels come from.

    Attributes:
        class_names: of the columns of scores.
        config: of the run that trained it.
    """

    def __init__(self, model: Any, about: dict[str, Any], decided: "Decision"):
        from mljax import config as configs
        from mljax.models.functional import split

        self.class_names: list[str] = list(about["class_names"])
        self.config = configs.from_dict(about["config"])
        self._model, self._weights = model, split(model)
        self._calibration = decided.calibration
        self._programs: dict[str, Any] = {}  # by method

    def heatmaps(
        self,
        images: Any,
        labels: Sequence[str] | None = None,
        *,
        top: int = 3,
        method: str = "auto",
    ) -> list[Heatmaps]:
        """The maps of some labels in each image.

        Args:
            images: a sequence of paths, PIL images and arrays (uint8 [height, width,
                3], RGB), or a single one of these.
            labels: whose maps, each once; None: the `top` likeliest of each image.
            top: see `labels`.
            method: "cam" (class activation; not of ml_decoder and query2label),
                "attention" (of these two), "gradcam" (of all), "auto": cam or
                attention, whichever the head has.

        Raises:
            UserError: an image cannot be read, a label is unknown, or the head has no
                maps of this kind.
        """
        from PIL import Image

        columns = self._columns(labels, top)
        single = getattr(images, "ndim", 0) in (2, 3)  # an array of whatever library
        if single or isinstance(images, str | Path | Image.Image):
            images = [images]
        given = list(images)
        found: list[Heatmaps] = []
        for start in range(0, len(given), BATCH):
            found += self._batch(given[start : start + BATCH], columns, method)
        return found

    def photo(self, image: Any) -> np.ndarray:
        """The pixels of an image, uint8 [height, width, 3]; raises as `heatmaps`."""
        from mljax.images import UnreadableImage, read

        try:
            return read(image, self.config.data.max_pixels)
        except UnreadableImage as error:
            name = image if isinstance(image, str | Path) else "an image"
            raise UserError(f"{name}: cannot be read ({error})") from None

    def _batch(
        self, given: list[Any], columns: np.ndarray, method: str
    ) -> Iterator[Heatmaps]:
        from mljax import images

        data = self.config.data
        photos = [self.photo(image) for image in given]
        # Few sizes of batches, each compiled once: powers of two.
        count = 1 << (len(photos) - 1).bit_length()
        batch = np.zeros((count, *images.sides_of(data), 3), np.uint8)
        for i, image in enumerate(given):  # a file as `predict` reads it
            batch[i] = images.load(image, data)
        if method not in self._programs:
            self._programs[method] = self._program(method)
        p, chosen, maps = self._programs[method](self._weights, batch, columns)
        p, chosen, maps = np.asarray(p), np.asarray(chosen), np.asarray(maps)
        for i, photo in enumerate(photos):
            names = [self.class_names[c] for c in chosen[i]]
            size = photo.shape[:2]
            place = images.seen(size, data)
            yield Heatmaps(names, p[i], np.moveaxis(maps[i], 2, 0), size, *place)

    def _program(self, method: str) -> Any:
        """(weights, images uint8 [batch, height, width, 3], columns [labels])
        -> probabilities and columns [batch, labels], maps [batch, h, w, labels]."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mljax import decision
        from mljax.data.augment import normalise
        from mljax.models import explain

        maps_of = explain.find(method, self._model.head)
        graph, *_ = nnx.split(self._model, nnx.Param, nnx.BatchStat)

        @jax.jit
        def run(weights: Any, images: jax.Array, few: jax.Array) -> Any:
            network = nnx.merge(graph, *weights)
            pixels = normalise(images)
            feature_map = network.backbone(pixels)
            scores = network.head(feature_map)
            if self.config.eval.flip:  # the maps are of the photo as it is
                mirrored = network.head(network.backbone(pixels[:, :, ::-1]))
                scores = (scores + mirrored) / 2
            p = decision.probabilities(scores, self.config.loss, self._calibration)
            # By score where probabilities are equal, all but 1 for example.
            likeliest = jnp.lexsort((-scores, -p), axis=1)[:, : len(few)]
            chosen = jnp.where(few < 0, likeliest, few)
            p = jnp.take_along_axis(p, chosen, 1)
            maps = maps_of(network.head, feature_map, chosen)
            return p, chosen, maps.astype(jnp.float32)

        return run

    def _columns(self, labels: Sequence[str] | None, top: int) -> np.ndarray:
        """Of the labels, int32; -1 stands for the likeliest, the second, and so on."""
        names = self.class_names
        if labels is None:
            if top < 1:
                raise UserError(f"top = {top}: must be at least 1")
            return np.full(min(top, len(names)), -1, np.int32)
        if isinstance(labels, str) or not labels:
            raise UserError(f"labels = {labels!r}: must be a list of at least one name")
        for label in labels:
            if label not in names:
                near = difflib.get_close_matches(label, names, n=3)
                some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
                hint = f"did you mean {', '.join(near)}?" if near else f"it has {some}"
                raise UserError(f"the model has no label {label!r}; {hint}")
        return np.array([names.index(x) for x in dict.fromkeys(labels)], np.int32)
