"""The label graph of the user's own data: counted, reported, saved with the run."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

import numpy as np
from ml_collections import ConfigDict

from mljax import label_graph_picture, whole
from mljax.errors import UserError
from mljax.word_embeddings import load_embeddings, random_embeddings

if TYPE_CHECKING:  # it imports TensorFlow
    from mljax.data.source import Source

HEADS = ("gcn", "gat")  # those that use a label graph
_STRONGEST = 10  # pairs in the report


class LabelGraph(NamedTuple):
    """What the "gcn" and "gat" heads are built from.

    Attributes:
        class_names: of the rows and columns.
        cooccurrence: float64 [num_classes, num_classes], P(j | i) in row i.
        embeddings: float32 [num_classes, any], a vector for each label.
        tau: pairs from this probability on are edges.
        notes: what the user should know about the embeddings.
    """

    class_names: list[str]
    cooccurrence: np.ndarray
    embeddings: np.ndarray
    tau: float
    notes: list[str]


def build(config: ConfigDict, source: "Source") -> LabelGraph | None:
    """The graph of `config.model.graph` and of the training labels.

    Args:
        config: a whole config.
        source: the images that are trained on.

    Returns:
        None where the head uses no graph.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    graph, names = config.model.graph, source.class_names
    if config.model.head not in HEADS:
        return None
    if graph.adjacency:
        matrix = read_cooccurrence(graph.adjacency, len(names))
    elif graph.by_occurrences:
        if source.objects is None:
            raise UserError(
                "config.model.graph.by_occurrences: data.name = "
                f"{config.data.name!r} does not tell how often a label is in an image"
            )
        matrix = cooccurrence(source.labels, source.objects.sum(0, dtype=np.int64))
    else:
        matrix = cooccurrence(source.labels)
    if graph.embeddings:
        vectors, notes = load_embeddings(graph.embeddings, names, graph.embedding_std)
    else:
        vectors = random_embeddings(names, graph.embedding_dim, graph.embedding_std)
        notes = ["label embeddings: random (model.graph.embeddings names none)"]
    return LabelGraph(names, matrix, vectors, graph.tau, notes)


def cooccurrence(
    labels: np.ndarray, occurrences: np.ndarray | None = None
) -> np.ndarray:
    """P(j | i): images with both labels over images with label i.

    Args:
        labels: [num_images, num_classes] in {1, 0, -1}. An image counts for a pair
            only if both of its labels are known, so -1 changes no probability.
        occurrences: [num_classes], how often each label stands in all images (once an
            object); divides by these instead, as the files of the published method do,
            with those of images whose other label is unknown.

    Returns:
        float64 [num_classes, num_classes], zero on the diagonal and in the row of a
        label that no image has.
    """
    # float32 products are exact up to 2^24 images, and fast.
    positive = (labels == 1).astype(np.float32)
    both = (positive.T @ positive).astype(np.float64)
    if occurrences is None:
        known = (labels != -1).astype(np.float32)
        first = (positive.T @ known).astype(np.float64)
    else:
        first = np.tile(np.asarray(occurrences, np.float64)[:, None], len(both))
    result = np.divide(both, first, out=np.zeros_like(both), where=first > 0)
    np.fill_diagonal(result, 0)
    return result


def read_cooccurrence(path: str | Path, num_classes: int) -> np.ndarray:
    """P(j | i) from an .npy file, its diagonal set to zero: [num_classes, num_classes].

    Raises:
        UserError: the file is missing, or is no such array.
    """
    what = f"config.model.graph.adjacency {path}"
    try:
        matrix = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such file") from None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{what}: is not an .npy array ({error})") from error
    shape = (num_classes, num_classes)
    if not isinstance(matrix, np.ndarray) or matrix.shape != shape:
        found = list(getattr(matrix, "shape", []))
        raise UserError(
            f"{what}: has shape {found}; needs {list(shape)}, a row and a column for "
            "each label, in the order of their names"
        )
    if (
        not np.issubdtype(matrix.dtype, np.number)
        or not ((matrix >= 0) & (matrix <= 1)).all()
    ):
        raise UserError(f"{what}: must hold probabilities P(j | i), between 0 and 1")
    matrix = matrix.astype(np.float64)
    np.fill_diagonal(matrix, 0)
    return matrix


def report(graph: LabelGraph) -> list[str]:
    """The graph in words: edges, strongest pairs, isolated labels, notes."""
    names, p = graph.class_names, graph.cooccurrence
    edges = p >= graph.tau
    alone = [names[i] for i in np.flatnonzero(~(edges.any(0) | edges.any(1)))]
    lines = [
        f"graph:   {len(names)} labels, {edges.sum()} edges (P >= {graph.tau:g}), "
        f"{len(alone)} labels without any"
    ]
    order = np.argsort(-p, axis=None, kind="stable")[:_STRONGEST]
    pairs = [divmod(int(k), len(names)) for k in order if p.flat[k] > 0]
    if pairs:
        told = [f"{names[i]} -> {names[j]} {p[i, j]:.2f}" for i, j in pairs]
        lines.append(f"graph:   strongest: {', '.join(told)}")
    if alone:
        lines.append(f"graph:   isolated: {', '.join(alone)}")
    if not edges.any():
        lines.append(
            "graph:   no edges: every label stands alone; lower model.graph.tau"
        )
    return lines + [f"graph:   {note}" for note in graph.notes]


def save(folder: Path, graph: LabelGraph) -> None:
    """Writes label_graph.npz (plain arrays) and label_graph.png into `folder`."""
    file = folder / "label_graph.npz"
    with whole.replacing(file) as part, part.open("wb") as handle:
        np.savez_compressed(
            handle,
            class_names=np.asarray(graph.class_names),
            cooccurrence=graph.cooccurrence,
            embeddings=graph.embeddings,
            tau=graph.tau,
        )
    label_graph_picture.draw(
        folder / "label_graph.png", graph.class_names, graph.cooccurrence, graph.tau
    )
