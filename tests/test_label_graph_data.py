"""The label graph of a data set: counts, words, report, picture."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import shared
from PIL import Image

from configs.common import get_config
from mljax import label_graph_data, label_graph_picture
from mljax.data import annotations
from mljax.errors import UserError
from mljax.label_graph_data import (
    LabelGraph,
    build,
    cooccurrence,
    read_cooccurrence,
    report,
    save,
)
from mljax.word_embeddings import load_embeddings, random_embeddings


def test_the_published_voc_graph_exactly():
    file = shared("reference/annotations/VOC/train.json")
    expected = np.load(shared("reference/graph/adj_matrix_voc.npy"))
    source = annotations.read(file, "train", 10**8, missing="keep")  # without images
    config = get_config()
    config.model.head = "gcn"
    config.model.graph.by_occurrences = True
    graph = build(config, source)
    np.testing.assert_array_equal(graph.cooccurrence, expected)
    assert graph.embeddings.shape == (20, 300)
    # By images, an image with ten chairs counts once, so that more pairs are edges.
    config.model.graph.by_occurrences = False
    assert (build(config, source).cooccurrence >= expected).all()


@pytest.mark.parametrize("data, edges, alone", [("voc", 5, 14), ("coco", 35, 46)])
def test_report(data, edges, alone):
    matrix = np.load(shared(f"reference/graph/adj_matrix_{data}.npy"))
    names = [f"label {i}" for i in range(len(matrix))]
    lines = report(LabelGraph(names, matrix, np.zeros((1, 1)), 0.4, ["a note"]))
    assert f"{edges} edges (P >= 0.4), {alone} labels without any" in lines[0]
    i, j = np.unravel_index(matrix.argmax(), matrix.shape)
    assert f"strongest: label {i} -> label {j} {matrix[i, j]:.2f}" in lines[1]
    assert len(lines[2].split(",")) == alone and "a note" in lines[3]
    no_edges = report(LabelGraph(names, matrix, np.zeros((1, 1)), 0.9, []))
    assert "lower model.graph.tau" in no_edges[-1]


def test_cooccurrence_is_its_definition():
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.int8)
    expected = [[0, 2 / 3, 0], [2 / 3, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(cooccurrence(labels), expected)
    np.testing.assert_allclose(cooccurrence(labels, [6, 4, 0])[0], [0, 1 / 3, 0])


def test_unknown_labels_are_left_out():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (50, 6)).astype(np.int8)
    expected = cooccurrence(labels)
    unseen = np.full((30, 6), -1, np.int8)
    np.testing.assert_array_equal(
        cooccurrence(np.concatenate([labels, unseen])), expected
    )
    # A pair is counted in the images in which both labels are known.
    labels[:20, 2] = -1
    changed = cooccurrence(labels)
    np.testing.assert_array_equal(
        np.delete(changed, 2, 1)[[0, 1, 3, 4, 5]],
        np.delete(expected, 2, 1)[[0, 1, 3, 4, 5]],
    )
    known = cooccurrence(labels[20:])
    np.testing.assert_array_equal(changed[:, 2], known[:, 2])
    np.testing.assert_array_equal(changed[2], known[2])


def test_renumbering_the_labels_renumbers_the_graph():
    labels = np.random.default_rng(0).integers(-1, 2, (60, 5)).astype(np.int8)
    order = np.array([3, 1, 4, 0, 2])
    np.testing.assert_array_equal(
        cooccurrence(labels[:, order]), cooccurrence(labels)[np.ix_(order, order)]
    )


def test_occurrences_of_the_images_that_are_trained_on(tmp_path):
    file = tmp_path / "train.json"
    images = [["a.jpg", [7, 7, 10]], ["b.jpg", [7], [10]], ["c.jpg", []]]
    file.write_text(json.dumps({"classes": [10, 7], "images": images}))
    source = annotations.read(file, "train", 10**8, missing="keep")
    np.testing.assert_array_equal(source.objects, [[2, 1], [1, 0], [0, 0]])
    config = get_config()
    config.model.head, config.model.graph.by_occurrences = "gat", True
    whole = build(config, source).cooccurrence
    np.testing.assert_allclose(whole, [[0, 1 / 3], [1, 0]])
    part = build(config, source.take([1, 0])).cooccurrence
    np.testing.assert_array_equal(part, whole)
    np.testing.assert_array_equal(build(config, source.take([1])).cooccurrence, 0)


def test_adjacency_file(tmp_path):
    file = tmp_path / "graph.npy"
    np.save(file, np.full((3, 3), 0.5, np.float32))
    matrix = read_cooccurrence(file, 3)
    np.testing.assert_array_equal(matrix, 0.5 - 0.5 * np.eye(3))

    def message(num_classes):
        with pytest.raises(UserError) as error:
            read_cooccurrence(file, num_classes)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "has shape [3, 3]; needs [4, 4]" in message(4)
    for wrong in (2.0, -0.1, np.nan):
        np.save(file, np.full((3, 3), wrong))
        assert "between 0 and 1" in message(3)
    np.save(file, np.array([{"nums": 3}]), allow_pickle=True)
    assert "is not an .npy array" in message(3)
    file.write_text("")
    assert "is not an .npy array" in message(3)
    file.unlink()
    assert "no such file" in message(3)


def test_random_embeddings_belong_to_the_name():
    one = random_embeddings(["cat", "dog", "sofa"])
    other = random_embeddings(["sofa", "cat"])
    np.testing.assert_array_equal(one[[2, 0]], other)
    assert one.dtype == np.float32
    many = random_embeddings([str(i) for i in range(200)], dim=50, std=0.2)
    assert many.shape == (200, 50)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 0.2) < 0.01


WORDS = """cat 1 2 3
dining 2 2 2
table 4 0 0
hot_dog 5 5 5
. . 9 9 9
dog 7 7 7
cat 8 8 8
"""


@pytest.mark.parametrize("header", ["", "7 3\n"])
def test_word_vectors(tmp_path, header):
    file = tmp_path / "words.txt"
    file.write_text(header + WORDS)
    names = ["Cat", "dining table", "hot dog", "tv dog", "xylophone", "."]
    vectors, notes = load_embeddings(file, names)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors[0], [1, 2, 3])
    np.testing.assert_array_equal(vectors[1], [3, 1, 1])
    np.testing.assert_array_equal(vectors[2], [5, 5, 5])
    np.testing.assert_array_equal(vectors[3], [7, 7, 7])
    np.testing.assert_array_equal(vectors[4:], random_embeddings(names[4:], 3))
    assert "2 of 6 labels, which have a random one: xylophone, ." in notes[0]
    assert "'tv' of 'tv dog'" in notes[1]


def test_embedding_files_that_do_not_fit(tmp_path):
    def message(name, content=None):
        file = tmp_path / name
        if isinstance(content, np.ndarray):
            np.save(file, content)
        elif content is not None:
            file.write_text(content)
        with pytest.raises(UserError) as error:
            load_embeddings(file, ["cat", "dog"])
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "no such file" in message("none.txt")
    assert "none of the labels' words" in message("other.txt", "bird 1 2\n")
    assert "none of the labels' words" in message("empty.txt", "")
    assert "line 2 ('cat')" in message("text.txt", "bird 1 2\ncat 1 x\n")
    assert "has shape [3, 4]; needs one row" in message("a.npy", np.zeros((3, 4)))
    assert "NaN" in message("b.npy", np.full((2, 4), np.nan))
    words = "line 2 ('cat') holds NaN or infinity"
    assert words in message("text.txt", "bird 1 2\ncat 1 nan\n")
    assert words in message("text.txt", "bird 1 2\ncat -inf 1\n")
    with (tmp_path / "e.npy").open("wb") as file:
        np.savez(file, vectors=np.ones((2, 4)))
    with pytest.raises(UserError, match="e.npy: is an .npz archive"):
        load_embeddings(tmp_path / "e.npy", ["cat", "dog"])
    assert "c.npy" in message("c.npy", "")
    np.save(tmp_path / "d.npy", np.ones((2, 4)))
    vectors, notes = load_embeddings(tmp_path / "d.npy", ["cat", "dog"])
    assert vectors.dtype == np.float32 and notes == []


def test_build_names_what_does_not_fit():
    config, source = (
        get_config(),
        SimpleNamespace(
            class_names=["a", "b"],
            labels=np.array([[1, 0], [1, 1]], np.int8),
            objects=None,
        ),
    )
    assert build(config, source) is None  # a head without a graph
    config.model.head = "gat"
    graph = build(config, source)
    np.testing.assert_array_equal(graph.cooccurrence, [[0, 0.5], [1, 0]])
    assert "random" in graph.notes[0]
    config.model.graph.update(embedding_dim=3000, embedding_std=2.0)
    vectors = build(config, source).embeddings
    assert vectors.shape == (2, 3000) and np.std(vectors) == pytest.approx(2, rel=0.1)
    config.data.name, config.model.graph.by_occurrences = "tfds", True
    with pytest.raises(UserError, match="by_occurrences: data.name = .tfds. does not"):
        build(config, source)


@pytest.mark.parametrize("num_classes", [1, 20, 500])
def test_the_graph_is_saved_with_a_picture(tmp_path, num_classes):
    rng = np.random.default_rng(0)
    matrix = rng.uniform(size=(num_classes, num_classes)) ** 60
    np.fill_diagonal(matrix, 0)
    names = [f"label {i}" for i in range(num_classes)]
    graph = LabelGraph(names, matrix, random_embeddings(names, 5), 0.5, [])
    save(tmp_path, graph)
    stored = np.load(tmp_path / "label_graph.npz")
    np.testing.assert_array_equal(stored["cooccurrence"], matrix)
    assert stored["class_names"].tolist() == names and stored["tau"] == 0.5
    picture = np.asarray(Image.open(tmp_path / "label_graph.png").convert("RGB"))
    assert picture.shape == (1160, 1100, 3) and (picture < 128).any(2).sum() > 500


def test_labels_that_go_together_stand_together():
    edges = np.zeros((6, 6), bool)
    edges[0, 5] = edges[3, 5] = edges[1, 4] = True
    order = label_graph_picture.around_the_circle(edges)
    assert set(order[:3]) == {0, 3, 5} and set(order[3:5]) == {1, 4} and order[5] == 2
    assert label_graph_data.HEADS == ("gcn", "gat")
