"""Label-graph heads: PyTorch numbers, folding, equivariance, training trajectories."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx

from mljax.config import common
from mljax.label_graph_data import LabelGraph
from mljax.models import build_head, build_model, import_torch
from mljax.models.functional import merge, split
from mljax.models.label_graph import (
    FoldedHead,
    GraphAttention,
    GraphConvolution,
    fold,
    normalise,
    threshold,
)
from mljax.models.linear import LinearHead
from mljax.word_embeddings import random_embeddings

POOLS = ("avg", "max", "avg+max")
WEIGHTS = {"gcn": ("weight",), "gan": ("W", "a")}
HEAD = {"gcn": "gcn", "gan": "gat"}


def graph_golden():
    return np.load(shared("golden/graph.npz"))


def cooccurrence_of(data):
    return np.load(shared(f"reference/graph/adj_matrix_{data}.npy"))


@pytest.mark.parametrize("data", ["voc", "coco", "nus"])
@pytest.mark.parametrize("tau, rho", [(0.4, 0.25), (0.3, 0.25), (0.4, 0.2)])
def test_threshold_and_normalise_golden(data, tau, rho):
    golden, key = graph_golden(), f"{data}_t{tau}_r{rho}"
    A = threshold(cooccurrence_of(data), tau, rho)
    np.testing.assert_allclose(A, golden[f"A_{key}"], rtol=0, atol=1e-14)
    np.testing.assert_allclose(normalise(A), golden[f"adj_{key}"], rtol=1e-6)


@pytest.mark.parametrize("data", ["voc", "coco", "nus"])
def test_rho_0_keeps_the_labels_themselves(data):
    golden, matrix = graph_golden(), cooccurrence_of(data)
    A = threshold(matrix, 0.4, 0.0)
    np.testing.assert_array_equal(A, np.eye(len(A)))
    np.testing.assert_array_equal(normalise(A), np.eye(len(A)))
    # The reference leaves the bare edges there, and NaN once they are normalised.
    bare = (matrix >= 0.4).astype(float)
    np.testing.assert_array_equal(bare, golden[f"A_{data}_t0.4_r0.0"])
    assert np.isnan(golden[f"adj_{data}_t0.4_r0.0"]).any()


def test_unit_layers_golden():
    golden = graph_golden()
    h, adjacency = (jnp.asarray(golden[f"unit/{k}"]) for k in ("h", "adj"))
    convolution = GraphConvolution(6, 5, dtype="float32", rngs=nnx.Rngs(0))
    import_torch.load(convolution, {"weight": golden["unit/gcn.weight"]})
    expected = golden["unit/gcn_out"][0] - golden["unit/gcn.bias"][0]
    np.testing.assert_allclose(
        convolution(h, adjacency), expected, rtol=1e-5, atol=1e-6
    )
    attention = GraphAttention(6, 5, dtype="float32", rngs=nnx.Rngs(0))
    import_torch.load(attention, {k: golden[f"unit/gat.{k}"] for k in ("W", "a")})
    expected = golden["unit/gat_out"]
    np.testing.assert_allclose(attention(h, adjacency), expected, rtol=1e-5, atol=1e-6)


def golden_head(case, loss, dtype="float32", **options):
    """The head of a golden case ("voc_gcn_h1"), its weights loaded by torch's names."""
    golden = graph_golden()
    data, layer, scale = case.split("_")
    state = {
        f"{gc}.{name}": golden[f"{case}/{gc}.{name}"]
        for gc in ("gc1", "gc2")
        for name in WEIGHTS[layer]
    }
    for name in ("weight", "bias")[: 1 if loss == "am_binary" else 2]:
        state[f"head.{name}"] = golden[f"{data}_head_{loss}.{name}"]
    state["A"] = golden[f"A_{data}_t0.4_r0.25"]
    state["inp"] = np.load(shared(f"reference/graph/word_embeddings_{data}.npy"))
    head = build_head(
        HEAD[layer],
        24,
        len(state["A"]),
        cosine=loss == "am_binary",
        hidden_dim_scale=float(scale[1:]),
        dtype=dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    import_torch.load(head, state)
    return head


CASES = [f"{d}_{g}_h1" for d in ("voc", "coco", "nus") for g in ("gcn", "gan")]
CASES += ["voc_gcn_h2", "voc_gan_h2"]


@pytest.mark.parametrize("case", CASES)
def test_layers_and_gate_golden(case):
    golden = graph_golden()
    loss = "am_binary"
    head = golden_head(case, loss)
    adjacency = normalise(head.A[...])
    one = head.gc1(head.inp[...], adjacency)
    two = head.gc2(jax.nn.leaky_relu(one, 0.2), adjacency)
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    close(one, golden[f"{case}/gc1_out"])
    close(two, golden[f"{case}/gc2_out"])
    close(head.gate(), golden[f"{case}/reweight"])
    with jax.enable_x64(True):
        gate = golden_head(case, loss, "float64").gate()
        assert gate.dtype == jnp.float64
        np.testing.assert_allclose(gate, golden[f"{case}/reweight_f64"], rtol=1e-11)


@pytest.mark.parametrize("case", CASES[:6])
@pytest.mark.parametrize("loss", ["am_binary", "asl"])
@pytest.mark.parametrize("pool", POOLS)
def test_logits_golden(case, loss, pool):
    golden = graph_golden()
    expected = golden[f"{case}/{loss}/{pool}/logits"]
    feature_map = golden["feature_map"].transpose(0, 2, 3, 1)
    scores = golden_head(case, loss, pool=pool)(jnp.asarray(feature_map))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-6)
    with jax.enable_x64(True):
        head = golden_head(case, loss, "float64", pool=pool)
        scores = head(jnp.asarray(feature_map, jnp.float64))
        np.testing.assert_allclose(scores, expected, rtol=1e-10)


@pytest.mark.parametrize("case", ["voc_gcn_h1", "voc_gan_h1"])
@pytest.mark.parametrize("loss", ["am_binary", "asl"])
def test_gradients_golden(case, loss):
    golden = graph_golden()
    with jax.enable_x64(True):
        head = golden_head(case, loss, "float64")
        graph, params, constants = nnx.split(head, nnx.Param, nnx.BatchStat)
        x = jnp.asarray(golden["feature_map"].transpose(0, 2, 3, 1), jnp.float64)

        def total(params, x):
            scores = nnx.merge(graph, params, constants)(x)
            return jnp.sum(scores * jnp.cos(jnp.arange(scores.size)).reshape(5, 20))

        grads, grad_x = jax.grad(total, (0, 1))(params, x)
        found = import_torch.export(nnx.merge(graph, grads, constants))
        found["feat"] = np.asarray(grad_x).transpose(0, 3, 1, 2)
        for key in golden:
            name = key.removeprefix(f"{case}/{loss}/avg/grad_")
            if name != key:
                expected = golden[key]
                atol = 1e-12 * np.abs(expected).max()
                np.testing.assert_allclose(found[name], expected, rtol=1e-8, atol=atol)


def some_graph(num_classes=7, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(size=(num_classes, num_classes)) * 0.7
    np.fill_diagonal(matrix, 0)
    vectors = 0.4 * rng.standard_normal((num_classes, 12)).astype(np.float32)
    return dict(adjacency=matrix, embeddings=vectors)


def some_map(dtype="float32", features=16):
    shape = (3, 4, 5, features)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


@pytest.mark.parametrize("name", ["gcn", "gat"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_equals_unfolded(name, pool, cosine, dtype):
    options = dict(pool=pool, cosine=cosine, dtype=dtype, **some_graph())
    head = build_head(name, 16, 7, rngs=nnx.Rngs(0), **options)
    folded, x = fold(head), some_map(dtype)
    assert isinstance(folded, FoldedHead if cosine else LinearHead)
    assert not any(key.startswith("gc") for key in import_torch.export(folded))
    np.testing.assert_allclose(folded(x), head(x), rtol=0, atol=1e-6)
    # By its definition the gate multiplies the map.
    gated = folded if cosine else head
    one = build_head("linear", 16, 7, pool=pool, dtype="float32", rngs=nnx.Rngs(0))
    one.classifier = gated.head
    gate = head.gate().astype(jnp.float32)
    np.testing.assert_allclose(
        one(x * gate), head(x), atol=1e-5 if dtype[0] == "f" else 0.03
    )


def test_fold_leaves_other_heads_alone_and_works_on_trained_weights():
    linear = build_head("linear", 16, 7, rngs=nnx.Rngs(0))
    assert fold(linear) is linear
    make = partial(build_head, "gcn", 16, 7, cosine=True, **some_graph())
    trained, fresh = make(rngs=nnx.Rngs(1)), make(rngs=nnx.Rngs(2))
    folded = fold(merge(fresh, *split(trained)))
    np.testing.assert_allclose(folded(some_map()), trained(some_map()), atol=1e-6)


@pytest.mark.parametrize("name", ["gcn", "gat"])
def test_renumbering_the_labels_renumbers_the_scores(name):
    graph, order = some_graph(), np.random.default_rng(3).permutation(7)
    build = partial(build_head, name, 16, 7, cosine=True)
    head = build(rngs=nnx.Rngs(0), **graph)
    other = build(
        rngs=nnx.Rngs(0),
        adjacency=graph["adjacency"][np.ix_(order, order)],
        embeddings=graph["embeddings"][order],
    )
    other.head.weight[...] = head.head.weight[...][:, order]
    x = some_map()
    np.testing.assert_allclose(other(x), head(x)[:, order], atol=1e-6)
    edgeless = build(rngs=nnx.Rngs(0), embeddings=graph["embeddings"])
    assert np.abs(edgeless.gate() - head.gate()).max() > 1e-3


def test_constants_are_state_but_not_parameters():
    head = build_head("gat", 16, 7, rngs=nnx.Rngs(0), **some_graph())
    params, constants = split(head)
    assert set(constants) == {"A", "inp"} and set(params) == {"gc1", "gc2", "head"}
    assert import_torch.export(head)["A"].dtype == np.float32
    np.testing.assert_allclose(
        constants["A"], threshold(some_graph()["adjacency"]), rtol=1e-7
    )


def test_initialisation():
    build = partial(build_head, features=64, num_classes=5, hidden_dim_scale=2.0)
    gcn = import_torch.export(build("gcn", rngs=nnx.Rngs(0)))
    assert gcn["gc1.weight"].shape == (300, 32) and gcn["gc2.weight"].shape == (32, 64)
    for name, bound in (("gc1", 32**-0.5), ("gc2", 64**-0.5)):
        largest = np.abs(gcn[f"{name}.weight"]).max()
        assert 0.98 * bound < largest <= bound * (1 + 1e-6)
    gat = import_torch.export(build("gat", rngs=nnx.Rngs(0)))
    assert gat["gc1.a"].shape == (64, 1) and gat["gc2.a"].shape == (128, 1)
    bound = 1.414 * np.sqrt(6 / 332)
    assert 0.98 * bound < np.abs(gat["gc1.W"]).max() <= bound * (1 + 1e-6)
    assert np.abs(gat["gc1.a"]).max() <= 1.414 * np.sqrt(6 / 65)
    np.testing.assert_array_equal(gcn["inp"], random_embeddings(list("01234")))
    np.testing.assert_array_equal(gcn["A"], np.eye(5))


def test_attention_dropout_acts_in_training_only():
    head = build_head("gat", 16, 7, rngs=nnx.Rngs(0), **some_graph())
    x = some_map()
    np.testing.assert_array_equal(head(x), head(x, rngs=nnx.Rngs(1)))
    one, two = (head(x, train=True, rngs=nnx.Rngs(seed)) for seed in (1, 2))
    assert not np.array_equal(one, two)
    with pytest.raises(ValueError, match="rngs"):
        head(x, train=True)


def test_bad_arguments_are_named():
    build = partial(build_head, "gcn", 16, 7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="avg, max"):
        build(pool="mean")
    with pytest.raises(ValueError, match=r"adjacency is \(3, 3\) for 7 labels"):
        build(adjacency=np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"embeddings are \(3, 4\) for 7 labels"):
        build(embeddings=np.zeros((3, 4)))


@pytest.mark.parametrize("name", ["gcn", "gat"])
def test_build_model_takes_the_graph(name):
    config = common().model
    config.backbone = "tf_mobilenetv3_large_minimal_100"
    config.head, config.graph.tau, config.graph.rho = name, 0.6, 0.1
    config.graph.attention_dropout = 0.3
    given = some_graph()
    graph = LabelGraph(
        list("abcdefg"), given["adjacency"], given["embeddings"], 0.6, []
    )

    def make(graph):
        return build_model(config, 7, angular=True, rngs=nnx.Rngs(0), graph=graph)

    model = make(graph)
    A = threshold(given["adjacency"], 0.6, 0.1)
    if name == "gat":
        layers = [m for _, m in nnx.iter_modules(model.head) if hasattr(m, "a")]
        assert layers and all(layer.dropout == 0.3 for layer in layers)
    np.testing.assert_allclose(model.head.A[...], A, rtol=1e-6)
    np.testing.assert_array_equal(model.head.inp[...], given["embeddings"])
    state = import_torch.export(model)
    assert {"A", "inp", "head.weight"} <= set(state)
    # Fine-tuning takes the weights of the file and keeps this run's graph.
    del state["A"]
    fresh = make(graph._replace(cooccurrence=np.zeros((7, 7))))
    assert import_torch.load_pretrained(fresh, state) == []
    np.testing.assert_array_equal(fresh.head.A[...], np.eye(7))
    np.testing.assert_array_equal(fresh.head.head.weight[...], state["head.weight"])
