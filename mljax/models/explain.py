"""Where in an image a score comes from: class activation, attention, Grad-CAM.

All look at the last map of the backbone, so that they serve every backbone; a ViT's
tokens are a map too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mljax.errors import UserError
from mljax.models.csra import CSRA, TEMPERATURES
from mljax.models.label_graph import FoldedHead, GraphHead
from mljax.models.layers import at_least_float32
from mljax.models.linear import CosineClassifier, LinearHead, normalise
from mljax.models.ml_decoder import MLDecoder
from mljax.models.query2label import Query2Label


def class_activation(head: nnx.Module, feature_map: jax.Array) -> jax.Array:
    """What each position adds to each score; the mean over the positions is the score.

    For an average pooling and a linear classifier this is CAM, Zhou et al. (2016),
    arXiv 1512.04150, equation 2. It stays exact further on: what is linear given the
    image itself is taken with this image's numbers. Those are the length of the pooled
    vector (cosines), the gate of a label graph, the slope of the activation between
    `conv_head` and classifier, the attention of CSRA. In a maximum a channel counts
    where it is largest.

    Args:
        head: linear, cosine, csra, gcn or gat (folded or not).
        feature_map: [batch, H, W, features].

    Returns:
        [batch, H, W, num_classes], logits or cosines, in float32 at least.

    Raises:
        UserError: another head; it looks at the map through attention.
    """
    if isinstance(head, CSRA):
        return _csra(head, feature_map)
    if isinstance(head, LinearHead):
        parts = _pooled_parts(feature_map, head.pool)
        if head.conv_head is not None and head.act2 is not None:
            parts = head.conv_head(parts).astype(parts.dtype)
            pooled = jnp.mean(parts, (1, 2), keepdims=True)
            slope = head.act2(pooled) / jnp.where(pooled == 0, 1, pooled)
            parts = parts * slope
        return _classify(head.classifier, parts)
    if isinstance(head, GraphHead | FoldedHead):
        gate = head.gate() if isinstance(head, GraphHead) else head.gate[...]
        return _classify(head.head, _pooled_parts(feature_map, head.pool) * gate)
    raise UserError(
        "this model's head looks at the map through attention and has no class "
        "activation (cam): choose attention or gradcam"
    )


def attention(head: nnx.Module, feature_map: jax.Array) -> jax.Array:
    """Where the decoder looks for each label; sums of 1 over the positions.

    The mean over the attention heads, in the last layer. The labels of one ML-Decoder
    group share a query and so a map; with up to 100 classes each has its own.

    Args:
        head: ml_decoder or query2label.
        feature_map: [batch, H, W, features].

    Returns:
        [batch, H, W, num_classes], float32 at least.

    Raises:
        UserError: another head.
    """
    if isinstance(head, MLDecoder):
        decoder = head.decoder
        columns = decoder.duplicate_pooling.shape[2]
        weights = jnp.repeat(decoder.attention(feature_map), columns, axis=1)
        weights = weights[:, : len(decoder.duplicate_pooling_bias[...])]
    elif isinstance(head, Query2Label):
        weights = head.attention(feature_map)
    else:
        raise UserError(
            "this model's head has no attention for each label: choose cam or gradcam"
        )
    return jnp.moveaxis(weights, 1, 2).reshape(*feature_map.shape[:3], -1)


def grad_cam(head: Any, feature_map: jax.Array, chosen: jax.Array) -> jax.Array:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2).

    relu(sum_k a_k f_k(x)), a_k the mean over x of the score's derivative by f_k(x).

    Args:
        head: any.
        feature_map: [batch, H, W, features].
        chosen: columns of the scores, integers [batch, labels].

    Returns:
        [batch, H, W, labels], 0 or more.
    """
    scores, pull = jax.vjp(head, feature_map)
    each = jax.nn.one_hot(chosen.T, scores.shape[1], dtype=scores.dtype)
    (gradients,) = jax.vmap(pull)(each)  # [labels, batch, H, W, features]
    weights = jnp.mean(gradients, (2, 3))
    return jax.nn.relu(jnp.einsum("lbf,bhwf->bhwl", weights, feature_map))


def _all_classes(method: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def few(head: nnx.Module, feature_map: jax.Array, chosen: jax.Array) -> jax.Array:
        maps = method(head, feature_map)
        return jnp.take_along_axis(maps, chosen[:, None, None], axis=3)

    return few


# (head, map [batch, H, W, features], chosen [batch, labels]) -> [batch, H, W, labels]
METHODS: dict[str, Callable[..., jax.Array]] = {
    "cam": _all_classes(class_activation),
    "attention": _all_classes(attention),
    "gradcam": grad_cam,
}


def find(method: str, head: nnx.Module) -> Callable[..., jax.Array]:
    """One of METHODS; for "auto" the head's own: its attention, or class activation.

    Raises:
        UserError: there is no such method.
    """
    if method == "auto":
        decodes = isinstance(head, MLDecoder | Query2Label)
        method = "attention" if decodes else "cam"
    if method not in METHODS:
        raise UserError(
            f"unknown method {method!r} for heat maps; choose auto, "
            f"{', '.join(METHODS)}"
        )
    return METHODS[method]


def _pooled_parts(x: jax.Array, kind: str) -> jax.Array:
    """What each position adds to `layers.pool(x, kind)`, of which this is the mean."""
    x = x.astype(at_least_float32(x.dtype))
    if kind == "avg":
        return x
    largest = x == jnp.max(x, (1, 2), keepdims=True)
    share = largest / jnp.mean(largest, (1, 2), keepdims=True, dtype=x.dtype)
    return x * share if kind == "max" else x + x * share


def _classify(classifier: Any, parts: jax.Array) -> jax.Array:
    if not isinstance(classifier, CosineClassifier):
        return classifier(parts).astype(parts.dtype)
    pooled = jnp.mean(parts, (1, 2), keepdims=True)
    length = jnp.maximum(jnp.linalg.norm(pooled, axis=3, keepdims=True), 1e-12)
    return (parts / length) @ normalise(classifier.weight[...], 0)


def _csra(head: CSRA, feature_map: jax.Array) -> jax.Array:
    scores = head.position_scores(feature_map)  # [batch, H W, heads, num_classes]
    temperatures = jnp.asarray(TEMPERATURES[head.heads], scores.dtype)[:, None]
    looked = jax.nn.softmax(temperatures * scores, axis=1) * scores.shape[1]
    scores = jnp.sum(scores * (1 + head.residual * looked), 2)
    if head.cosine:
        scores = scores / (head.heads * (1 + head.residual))
    return scores.reshape(*feature_map.shape[:3], -1)
