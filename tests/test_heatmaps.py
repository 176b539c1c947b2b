"""Heat maps: their sums, their places, and the pictures."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_label_graph import some_graph

from mljax import (
    checkpoint,
    decision,
    explain,
    heatmap_pictures,
    heatmaps,
    images,
    predict,
)
from mljax.calibration import Calibration
from mljax.config import common
from mljax.errors import UserError
from mljax.models import build_head, build_model, pretrained, vit
from mljax.models import explain as methods
from mljax.models.functional import split
from mljax.models.label_graph import fold
from mljax.models.transformer import MultiHeadAttention

FEATURES, CLASSES = 12, 5


def feature_map(*shape: int) -> jax.Array:
    values = np.random.default_rng(0).normal(size=shape or (2, 3, 4, FEATURES))
    return jax.nn.relu(jnp.asarray(values, jnp.float32))  # with ties among the zeros


def make_head(name: str, **options):
    if name in ("gcn", "gat"):
        options |= some_graph(CLASSES, 1)
    return build_head(name, FEATURES, CLASSES, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"pool": "max"}),
        ("linear", {"pool": "avg+max", "hidden": 7, "activation": "hard_swish"}),
        ("cosine", {"hidden": 7, "activation": "prelu"}),
        ("cosine", {"pool": "avg+max"}),
        ("gcn", {"pool": "max", "cosine": False}),
        ("gat", {"cosine": True}),
        ("csra", {"heads": 4}),
        ("csra", {"heads": 2, "cosine": True}),
    ],
)
def test_class_activation_averages_to_the_score(name, options):
    head, x = make_head(name, **options), feature_map()
    for used in (head, fold(head)) if name in ("gcn", "gat") else (head,):

        @jax.jit
        def both(x, used=used):
            return methods.class_activation(used, x), used(x)

        maps, scores = both(x)
        assert maps.shape == (2, 3, 4, CLASSES)
        np.testing.assert_allclose(np.mean(maps, (1, 2)), scores, atol=1e-5)
    assert np.ptp(maps, (1, 2)).min() > 0


def test_class_activation_is_the_product_at_each_position():
    head, x = make_head("linear"), feature_map()
    weight = np.asarray(head.classifier.weight[...])
    expected = np.asarray(x) @ weight + np.asarray(head.classifier.bias[...])
    np.testing.assert_allclose(methods.class_activation(head, x), expected, atol=1e-6)
    # and then Grad-CAM is its positive part, without the bias and over the positions
    chosen = np.array([[3, 0], [1, 4]])
    maps = methods.grad_cam(head, x, jnp.asarray(chosen))
    expected = np.maximum(np.asarray(x) @ weight / 12, 0)
    expected = np.take_along_axis(expected, chosen[:, None, None], 3)
    np.testing.assert_allclose(maps, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["csra", "gcn", "ml_decoder"])
def test_grad_cam_of_every_head(name):
    options = {"dim": 16, "feedforward": 16} if name == "ml_decoder" else {}
    head, x = make_head(name, **options), feature_map()

    @jax.jit
    def both(x):
        maps = methods.grad_cam(head, x, jnp.array([[2], [4]]))
        return maps, jax.grad(lambda f: head(f)[0, 2])(x)[0]

    maps, gradient = both(x)
    expected = np.maximum(np.asarray(x[0]) @ np.mean(gradient, (0, 1)), 0)
    assert maps.shape == (2, 3, 4, 1) and expected.max() > 0
    np.testing.assert_allclose(maps[0, :, :, 0], expected, atol=1e-6)


def sizes(name: str) -> dict[str, int]:
    layers = {"encoder_layers": 1} if name == "query2label" else {}
    return {"dim": 16, "feedforward": 16, "heads": 2} | layers


def test_labels_of_a_group_of_ml_decoder_share_a_map():
    head, x = make_head("ml_decoder", **sizes("ml_decoder"), groups=2), feature_map()
    maps = np.asarray(jax.jit(lambda x: methods.attention(head, x))(x))
    assert maps.shape == (2, 3, 4, CLASSES)
    # labels 0, 1, 2 and labels 3, 4
    np.testing.assert_array_equal(maps[..., 0], maps[..., 2])
    np.testing.assert_array_equal(maps[..., 3], maps[..., 4])
    assert np.abs(maps[..., 2] - maps[..., 3]).max() > 1e-4


@pytest.mark.parametrize("name", ["ml_decoder", "query2label"])
def test_attention_is_what_the_score_is_computed_with(name, monkeypatch):
    """Only what is looked at counts: other places may say anything."""
    head, x = make_head(name, **sizes(name)), feature_map(1, 2, 3, FEATURES)
    seen = []
    plain = MultiHeadAttention.attention

    def watched(self, queries, keys):
        seen.append(plain(self, queries, keys))
        return seen[-1]

    monkeypatch.setattr(MultiHeadAttention, "attention", watched)

    @jax.jit
    def both(x):
        seen.clear()
        head(x)
        last = seen[-1]  # of the last layer, at the map: [1, heads, labels, 6]
        return methods.attention(head, x), last

    maps, last = both(x)
    assert last.shape == (1, 2, CLASSES, 6)
    expected = np.mean(last, 1)[0].T.reshape(2, 3, CLASSES)
    np.testing.assert_allclose(maps[0], expected, atol=1e-6)
    np.testing.assert_allclose(np.sum(maps, (1, 2)), 1, atol=1e-5)
    assert np.ptp(maps, (1, 2)).min() > 1e-4


def test_mistakes_of_method():
    with pytest.raises(UserError, match="cam or gradcam"):
        methods.attention(make_head("linear"), feature_map())
    with pytest.raises(UserError, match="attention or gradcam"):
        methods.class_activation(make_head("ml_decoder", dim=16), feature_map())
    with pytest.raises(UserError, match="auto, cam, attention, gradcam"):
        methods.find("cma", make_head("linear"))


NAMES = ["$x_", "<b>", "cat", "dog"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, small_backbones):
    """Random weights, but a first class that is where pixels are bright."""
    config = common()
    config.model.backbone = "small_resnet"
    config.data.image_size = 64
    config.loss.name = "bce"
    model = build_model(config.model, len(NAMES), angular=False, rngs=nnx.Rngs(0))
    even = jnp.stack([jnp.full((64, 64, 3), v) for v in (1.0, -1.0)])
    bright, dark = model.backbone(even)[:, 3, 3]
    weight = model.head.classifier.weight
    weight[...] = weight[...].at[:, 0].set(bright - dark)
    folder = tmp_path_factory.mktemp("maps")
    params, batch_stats = split(model)
    checkpoint.save_variables(
        folder / "best" / "1",
        {"params": params, "batch_stats": batch_stats},
        {"config": config.to_dict(), "class_names": NAMES},
    )
    return folder


def photo(height: int, width: int) -> np.ndarray:
    """Black, with a white patch at the right of the lower part."""
    image = np.zeros((height, width, 3), np.uint8)
    image[height * 3 // 4 :, width // 2 : width * 3 // 4] = 255
    return image


def test_maps_lie_on_the_original_photo(workdir):
    model = heatmaps.load(workdir)
    photos = [photo(80, 200), photo(300, 100), photo(64, 64)]
    for method in ("cam", "gradcam", "auto"):
        found = model.heatmaps(photos, ["$x_"], method=method)
        for image, maps in zip(photos, found, strict=True):
            assert maps.labels == ["$x_"] and maps.size == image.shape[:2]
            assert maps.maps.shape == (1, 8, 8)
            (whole,) = maps.upsampled()
            assert whole.shape == image.shape[:2]
            row, column = np.unravel_index(whole.argmax(), whole.shape)
            assert image[row, column].all(), (method, row, column)


def test_mirror_images_and_more_than_a_batch(workdir, monkeypatch):
    """Probabilities as `predict` gives them, for every image."""
    monkeypatch.setattr(heatmaps, "BATCH", 2)
    read = pretrained.restore

    def with_flip(step):
        model, about = read(step)
        about["config"]["eval"]["flip"] = True
        return model, about

    photos = [photo(80, 150 + 50 * i) for i in range(5)]
    plain = predict.load(workdir).predict(photos)
    monkeypatch.setattr(pretrained, "restore", with_flip)
    p = predict.load(workdir).predict(photos)
    assert np.abs(p - plain).max() > 1e-3
    found = heatmaps.load(workdir).heatmaps(photos, top=9)
    for row, maps in zip(p, found, strict=True):
        expected = np.sort(row)[::-1]
        np.testing.assert_allclose(maps.probabilities, expected, atol=1e-6)


def test_labels_and_probabilities_are_those_of_predict(workdir):
    model, photos = heatmaps.load(workdir), [photo(80, 200), photo(300, 100)]
    p = predict.load(workdir, batch_size=2).predict(photos)
    for row, found in zip(p, model.heatmaps(photos, top=9), strict=True):
        assert found.labels == [NAMES[i] for i in np.argsort(-row)]
        np.testing.assert_allclose(found.probabilities, np.sort(row)[::-1], atol=1e-6)
    assert len(model.heatmaps(photos[0])) == 1 and model.heatmaps([]) == []
    # A big JPEG is decoded smaller by both.
    Image.fromarray(photo(900, 700)).save(workdir.parent / "big.jpg")
    big = [str(workdir.parent / "big.jpg")]
    (found,) = model.heatmaps(big, top=9)
    row = np.sort(predict.load(workdir).predict(big)[0])[::-1]
    np.testing.assert_allclose(found.probabilities, row, atol=1e-6)
    # An average of logits, and so the probability.
    (one,) = model.heatmaps(photos[:1], ["dog", "cat", "dog"])
    logits = one.maps.mean((1, 2))
    np.testing.assert_allclose(
        1 / (1 + np.exp(-logits)), p[0, [3, 2]], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(UserError, match="'cta'; did you mean cat"):
        model.heatmaps(photos, ["cta"])
    with pytest.raises(UserError, match="list of at least one"):
        model.heatmaps(photos, "cat")
    with pytest.raises(UserError, match="top = 0"):
        model.heatmaps(photos, top=0)
    with pytest.raises(UserError, match="none.jpg: cannot be read"):
        model.heatmaps(["none.jpg"])


def test_the_likeliest_are_so_as_calibrated(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    bias = np.array([-3, 0, 2, 1], np.float32)
    chosen = decision.default(len(NAMES))._replace(
        calibration=Calibration(np.ones(len(NAMES), np.float32), bias)
    )
    decision.save(tmp_path / "run" / "best" / "1", NAMES, chosen)
    image = photo(80, 200)
    plain = heatmaps.load(workdir).heatmaps(image, top=4)[0].labels
    (found,) = heatmaps.load(tmp_path / "run").heatmaps(image, top=4)
    row = predict.load(tmp_path / "run").predict(image)[0]
    assert found.labels == [NAMES[i] for i in np.argsort(-row)] != plain
    np.testing.assert_allclose(found.probabilities, np.sort(row)[::-1], atol=1e-6)


def test_tokens_of_a_vit_are_a_map():
    backbone = vit.VisionTransformer(24, 2, depth=1, rngs=nnx.Rngs(0))
    head = build_head("linear", backbone.num_features, CLASSES, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).normal(size=(1, 32, 48, 3))

    @jax.jit
    def both(images):
        feature_map = backbone(images)
        chosen = jnp.array([[0, 1]])
        maps = [methods.METHODS[m](head, feature_map, chosen) for m in few]
        return maps, head(feature_map)

    few = ("cam", "gradcam")
    (cam, gradcam), scores = both(jnp.asarray(images, jnp.float32))
    assert cam.shape == gradcam.shape == (1, 2, 3, 2)
    np.testing.assert_allclose(np.mean(cam, (1, 2)), scores[:, :2], atol=1e-5)


def test_overlay_keeps_the_shape_of_the_photo():
    image = photo(100, 700)
    drawn = heatmap_pictures.overlay(image, np.array([[0.0, 0], [0, 1]]))
    assert drawn.shape == (51, 360, 3) and drawn.dtype == np.uint8
    assert drawn[-1, -1].astype(int).sum() > drawn[0, 0].astype(int).sum() + 300
    assert heatmap_pictures.overlay(image, np.ones((2, 2)))[0, 0].max() <= 1


def test_pictures_of_a_folder(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heatmaps, "BATCH", 2)
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    Image.fromarray(photo(90, 300)).save(folder / "1.jpg")
    Image.fromarray(photo(90, 30)).save(folder / "1.png")
    Image.fromarray(photo(90, 90)).save(folder / "below" / "2.png")
    (folder / "text.jpg").write_text("not an image")
    flags = [f"--checkpoint={workdir}", f"--images={folder}"]
    flags.append(f"--output={tmp_path / 'out'}")
    assert explain.main(flags) == 0
    printed = capsys.readouterr()
    assert "text.jpg: cannot be read" in printed.err and "4 images, 1" in printed.out
    files = sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    names = [str(p.relative_to(tmp_path / "out")) for p in files]
    assert names == ["1.jpg.png", "1.png.png", "below/2.png.png"]
    with Image.open(files[0]) as drawn:
        assert drawn.width > 4 * 300
    # A big JPEG is read as `predict` reads it: decoded smaller.
    with monkeypatch.context() as patch:
        seen = []
        form = heatmaps.Explainer.heatmaps
        patch.setattr(
            heatmaps.Explainer,
            "heatmaps",
            lambda self, images, *rest, **more: (
                seen.extend(images) or form(self, images, *rest, **more)
            ),
        )
        assert explain.main([*flags, "--overwrite"]) == 0
        assert seen == [
            str(folder / name) for name in ("1.jpg", "1.png", "below/2.png")
        ]
    capsys.readouterr()
    assert explain.main(flags) == 1 and "exists" in capsys.readouterr().err
    assert explain.main([*flags, "--overwrite", "--label=<b>", "--label=$x_"]) == 0
    with Image.open(files[0]) as drawn:
        assert drawn.width < 4 * 300
    # A list may name a picture twice, and one that cannot be read between.
    (tmp_path / "list.txt").write_text(
        "photos/1.jpg\nphotos/text.jpg\nphotos/1.jpg\nphotos/1.png\n"
    )
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(heatmaps, "BATCH", 8)
        patch.setattr(
            heatmap_pictures,
            "draw",
            lambda file, photo, maps: drawn.append((file, photo)),
        )
        flags[1] = f"--images={tmp_path / 'list.txt'}"
        assert explain.main([*flags, "--overwrite"]) == 0
    shapes = [(file.name, shown.shape[:2]) for file, shown in drawn]
    assert shapes == [("1.jpg.png", (90, 300))] * 2 + [("1.png.png", (90, 30))]
    # It may name folders beside its own.
    listed = ["lists/../photos/1.jpg", "lists/local/2.jpg"]
    files = explain.output_files(listed, tmp_path / "maps")
    assert [str(f.relative_to(tmp_path / "maps")) for f in files] == [
        "photos/1.jpg.png",
        "lists/local/2.jpg.png",
    ]
    bad = [("--label=cta", "did you mean"), ("--method=attention", "no attention")]
    for flag, words in [*bad, ("--top=0", "top = 0")]:
        assert explain.main([*flags[:2], f"--output={tmp_path / 'new'}", flag]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert explain.main([*flags[:2], "--output="]) == 1
    assert "--output is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        explain.parse([*flags[:2], "--output=x", "--top=5", "--label=cat"])


def test_a_map_lies_where_the_photo_was_seen():
    data = common().data
    data.image_size = 64
    values = np.zeros((4, 4), np.float32)

    data.fit = "letterbox"  # rows 0 and 3 of the map are bars
    values[1] = 1  # the upper half of the photo
    over = heatmap_pictures.stretch(values, (40, 80), *images.seen((40, 80), data))
    assert over.shape == (40, 80)
    assert over[2:16].min() > 0.5 and over[24:].max() < 0.5

    data.fit = "crop"  # columns 20 to 60 of the photo
    values[:] = [0, 0, 1, 1]
    over = heatmap_pictures.stretch(values, (40, 80), *images.seen((40, 80), data))
    assert over[:, 45:60].min() > 0.8
    assert over[:, :20].max() == 0 == over[:, 60:].max()
