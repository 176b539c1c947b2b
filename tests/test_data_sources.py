"""Every source of files gives the same records for the same data."""

import itertools
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import source_trees
from source_trees import CLASSES, TRAIN, TRAIN_UNKNOWN, VAL, VAL_UNKNOWN, load

from mljax import config as configs
from mljax import evaluate, label_graph_data, losses
from mljax.data import pipeline
from mljax.errors import UserError


@pytest.mark.parametrize("name", source_trees.WRITERS)
def test_the_same_records(tmp_path, name):
    config = source_trees.write(name, tmp_path)
    sources = load(config)
    for source, labels in ((sources.train, TRAIN), (sources.val, VAL)):
        assert source.class_names == CLASSES
        np.testing.assert_array_equal(source.labels, labels)
        assert source.labels.dtype == np.int8 and source.notes == ()
        rows = pipeline.eval_batches(source, data_config=config, batch_size=4)
        images = np.concatenate([row["image"] for row in rows])[: len(labels)]
        np.testing.assert_array_equal(images[:, 3, 3, 1], np.arange(len(labels)))
    if name in ("annotations", "coco", "lists"):
        objects = sources.train.objects
        np.testing.assert_array_equal(objects > 0, TRAIN == 1)
        assert objects.sum() > TRAIN.sum()  # one label, several objects


@pytest.mark.parametrize("name", source_trees.WITH_UNKNOWN)
def test_unknown_labels_change_nothing_anywhere(tmp_path, name):
    """-1 from the file to the loss, the average precision and the label graph."""
    config = source_trees.write(name, tmp_path, TRAIN_UNKNOWN, VAL_UNKNOWN)
    sources = load(config)
    np.testing.assert_array_equal(sources.train.labels, TRAIN_UNKNOWN)
    np.testing.assert_array_equal(sources.val.labels, VAL_UNKNOWN)

    batches = pipeline.train_batches(
        sources.train, data_config=config, batch_size=3, seed=0
    )
    both = list(itertools.islice(batches, 2))  # an epoch
    index = np.concatenate([b["index"] for b in both])
    labels = np.concatenate([b["labels"] for b in both])
    np.testing.assert_array_equal(labels, TRAIN_UNKNOWN[index])
    rng = np.random.default_rng(0)
    outputs = rng.uniform(-1, 1, labels.shape)
    changed = np.where(labels == -1, rng.uniform(-1, 1, labels.shape), outputs)
    assert (changed != outputs).sum() == (TRAIN_UNKNOWN == -1).sum() == 2
    defaults = configs.common().loss
    for loss in losses.LOSSES:
        defaults.name = loss
        fn = losses.make_loss(defaults)
        assert fn(jnp.asarray(outputs), jnp.asarray(labels)) == fn(
            jnp.asarray(changed), jnp.asarray(labels)
        )

    rows = list(pipeline.eval_batches(sources.val, data_config=config, batch_size=3))
    truth = np.concatenate([row["labels"] for row in rows])
    np.testing.assert_array_equal(truth, VAL_UNKNOWN)
    scores = rng.uniform(-1, 1, truth.shape).astype(np.float32)
    reports = [
        evaluate.report(
            evaluate.Scores(s, truth, np.arange(3), np.arange(0)),
            lambda x: 1 / (1 + np.exp(-x)),
        )
        for s in (scores, np.where(truth == -1, np.float32(9.0), scores))
    ]
    assert reports[0] == reports[1]

    # In the graph an image counts for a pair only if both of its labels are known.
    graph = label_graph_data.cooccurrence(sources.train.labels)
    for i, j in itertools.permutations(range(3), 2):
        known = (TRAIN_UNKNOWN[:, i] == 1) & (TRAIN_UNKNOWN[:, j] != -1)
        both_there = known & (TRAIN_UNKNOWN[:, j] == 1)
        assert graph[i, j] == both_there.sum() / known.sum()


@pytest.mark.parametrize("name", source_trees.WRITERS)
def test_missing_images(tmp_path, name):
    config = source_trees.write(name, tmp_path)
    sources = load(config)
    gone = sources.train.names[1]
    with open(gone, "rb") as file:
        content = file.read()
    os.unlink(gone)
    with pytest.raises(UserError, match="is missing .1 of 6 are") as error:
        load(config)
    assert "\n" not in str(error.value) and "data.drop_missing" in str(error.value)

    config.on_error = "skip"  # it keeps its place and counts as unreadable
    kept = load(config).train
    assert len(kept) == 6
    np.testing.assert_array_equal(kept.labels, TRAIN)
    assert list(map(os.path.basename, kept.names)) == list(
        map(os.path.basename, sources.train.names)
    )

    config.on_error, config.drop_missing = "stop", True
    left = load(config).train
    np.testing.assert_array_equal(left.labels, np.delete(TRAIN, 1, 0))
    assert left.notes == ("1 of 6 images are missing, left out",)
    assert left.names == [name for name in sources.train.names if name != gone]
    assert [int(left.read(i)[0, 0, 0]) for i in range(5)] == [0, 2, 3, 4, 5]
    with open(gone, "wb") as file:
        file.write(content)
    assert load(config).train.notes == ()


def test_images_without_labels_can_be_left_out(tmp_path):
    config = source_trees.write("coco", tmp_path)
    config.drop_unlabelled = True
    sources = load(config)
    np.testing.assert_array_equal(sources.train.labels, np.delete(TRAIN, 2, 0))
    np.testing.assert_array_equal(sources.val.labels, VAL[:2])
    assert sources.val.notes == ("1 of 3 images have no label, left out",)
    assert len(sources.train.objects) == 5


@pytest.mark.parametrize(("policy", "value"), [("positive", 1), ("negative", 0)])
def test_difficult_objects_of_voc(tmp_path, policy, value):
    config = source_trees.write("voc", tmp_path, TRAIN_UNKNOWN, VAL_UNKNOWN)
    config.difficult = policy
    sources = load(config)
    expected = np.where(TRAIN_UNKNOWN == -1, np.int8(value), TRAIN_UNKNOWN)
    np.testing.assert_array_equal(sources.train.labels, expected)
    assert sources.train.notes == (
        f"2 labels rest on objects marked difficult only: {policy} (data.difficult)",
    )
    np.testing.assert_array_equal(sources.train.objects > 0, expected == 1)


def test_voc_has_its_twenty_classes_in_a_part_of_it_too(tmp_path):
    config = source_trees.write("voc", tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        text = file.read_text().replace("ant</", "bird</").replace("bee</", "boat</")
        file.write_text(text)
    source = load(config).train
    assert len(source.class_names) == 20 == len(set(source.class_names))
    assert source.class_names == sorted(source.class_names)
    columns = [source.class_names.index(name) for name in ("bird", "boat", "cat")]
    np.testing.assert_array_equal(source.labels[:, columns], TRAIN)
    assert source.labels.sum() == TRAIN.sum()


def test_voc_photos_in_folders_below(tmp_path):
    config = source_trees.write("voc", tmp_path)
    before = load(config).train
    pixels = before.read(0).numpy()
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part / "sub").mkdir()
    listed = tmp_path / "ImageSets" / "Main" / "train.txt"
    name, *others = listed.read_text().splitlines()
    listed.write_text("\n".join([f"sub/{name}", *others, ""]))
    (photo,) = (tmp_path / "JPEGImages").glob(f"{name}.*")
    photo.rename(tmp_path / "JPEGImages" / "sub" / f"{name}.JPEG")
    (tmp_path / "Annotations" / f"{name}.xml").rename(
        tmp_path / "Annotations" / "sub" / f"{name}.xml"
    )
    after = load(config).train
    np.testing.assert_array_equal(after.labels, before.labels)
    np.testing.assert_array_equal(after.read(0), pixels)


def test_nuswide_images_in_one_folder(tmp_path):
    config = source_trees.write("nuswide", tmp_path)
    for file in (tmp_path / "Flickr/trainer").iterdir():
        file.rename(tmp_path / "Flickr" / file.name)
    assert (tmp_path / "Flickr/0003_21244.jpg").is_file()
    (tmp_path / "Concepts81.txt").rename(tmp_path / "c")
    (tmp_path / "ConceptsList").mkdir()
    (tmp_path / "c").rename(tmp_path / "ConceptsList/Concepts81.txt")
    np.testing.assert_array_equal(load(config).train.labels, TRAIN)


def test_vg500_labels_are_numbers_sorted_by_value(tmp_path):
    config = source_trees.write("vg500", tmp_path)
    file = tmp_path / "vg_category_500_labels_index.json"
    index = json.loads(file.read_text())
    changed = {name: [10 if k == 1 else k for k in v] for name, v in index.items()}
    file.write_text(json.dumps(changed))
    config.classes = ""
    train = load(config).train
    assert train.class_names == ["0", "2", "10"]
    np.testing.assert_array_equal(train.labels, TRAIN[:, [0, 2, 1]])


def replaced(name, old, new):
    def change(root):
        file = root / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def unlink(name):
    return lambda root: (root / name).unlink()


INSTANCES = "annotations/instances_train2014.json"
CONCEPT = "Groundtruth/TrainTestLabels/Labels_bee_Train.txt"
INDEX = "vg_category_500_labels_index.json"
MISTAKES = [
    ("coco", unlink(INSTANCES), "train2014.json: no such file; data.train"),
    ("coco", replaced(INSTANCES, "{", ""), "is not valid JSON"),
    ("coco", replaced(INSTANCES, '"images"', '"pictures"'), "no list 'images'"),
    ("coco", replaced(INSTANCES, '"category_id": 1,', '"category_id": 2,'), "categ"),
    (
        "coco",
        replaced(INSTANCES, '"image_id": 101', '"image_id": 99'),
        "image_id 99",
    ),
    ("coco", replaced(INSTANCES, '"id": 101', '"id": 100'), r"images\[1\]: id 100 is"),
    ("coco", replaced(INSTANCES, '"id": 101', '"id": null'), r"images\[1\]: 'id' must"),
    ("coco", replaced(INSTANCES, '"name": "cat"', '"name": "ant"'), 'name "ant" is th'),
    ("coco", replaced(INSTANCES, '"name": "cat"', '"name": "cow"'), "differ in their"),
    ("coco", replaced(INSTANCES, '"name": "cat"', '"nom": 1'), r"categories\[2\] must"),
    (
        "coco",
        replaced(INSTANCES, '"cat"', '"\\ud800"'),
        r"\[2\]: 'name' must be a text",
    ),
    ("coco", replaced(INSTANCES, '"cat"', '" "'), r"categories\[2\]: 'name' must be"),
    ("voc", unlink("ImageSets/Main/train.txt"), "train.txt: no such file; data.train"),
    ("voc", unlink("Annotations/train ñ001.xml"), "train.txt, line 2: .*No such file"),
    (
        "voc",
        replaced("Annotations/train ñ001.xml", "</annotation>", ""),
        r"line 2: .*001.xml' cannot be read \(no element found: line 1",
    ),
    (
        "voc",
        replaced("Annotations/train ñ001.xml", "<name>bee</name>", ""),
        "001.xml': object 0 has no <name>",
    ),
    (
        "voc",
        replaced("Annotations/train ñ001.xml", "<difficult>1<", "<difficult>2<"),
        "<difficult> must be 0 or 1, found '2'",
    ),
    ("table", unlink("train.csv"), "train.csv: no such file; data.train"),
    (
        "table",
        replaced("train.csv", ",1\n", ",2\n"),
        "line 2: column 'ant' must be",
    ),
    (
        "table",
        replaced("train.csv", ",1\n", ",1,1\n"),
        "line 2: has 5 cells, the",
    ),
    ("table", replaced("train.csv", "image", "file"), "has no column 'image'"),
    ("table", replaced("train.csv", "bee", "ant"), "column 'ant' stands there twice"),
    ("table", replaced("train.csv", "bee", "wasp"), "differ in their classes"),
    ("table", replaced("train.csv", '"photos', '"gone'), "'gone/.* missing"),
    ("table", replaced("train.csv", 'png"', 'png"x'), "train.csv, line 2: "),
    ("lists", replaced("all.tsv", "['cat']", "[cat]"), "line 2: .* is no list of lab"),
    ("lists", replaced("all.tsv", "part", "set"), "has no column 'part'"),
    ("nuswide", unlink("Concepts81.txt"), "Concepts81.txt: no such file; data.root"),
    ("nuswide", unlink(CONCEPT), "Labels_bee_Train.txt: no such file; data.root"),
    ("nuswide", replaced(CONCEPT, "1", "2"), "Train.txt, line 2: must be 0 or 1"),
    ("nuswide", replaced(CONCEPT, "1", ""), "has 5 labels for the 6 images of"),
    ("vg500", unlink(INDEX), "labels_index.json: no such file; data.root"),
    ("vg500", replaced(INDEX, "train234371", "x"), "line 2: image .* is not in vg_cat"),
    ("vg500", replaced(INDEX, "[0]", "[true]"), "must have a list of numbers"),
    (
        "vg500",
        replaced("names.txt", "cat", "ant"),
        "line 3: class 'ant' stands in",
    ),
    ("vg500", replaced("names.txt", "cat", ""), "names 2 classes, but .* label 2"),
]


@pytest.mark.parametrize(("name", "change", "message"), MISTAKES)
def test_mistakes_are_one_line_that_names_the_place(tmp_path, name, change, message):
    unknown = name in source_trees.WITH_UNKNOWN
    tables = (TRAIN_UNKNOWN, VAL_UNKNOWN) if unknown else (TRAIN, VAL)
    config = source_trees.write(name, tmp_path, *tables)
    if name == "voc":  # an image with a difficult and another object of a class
        config.difficult = "positive"
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "annotations",
            {"difficult": "ignored"},
            "without config.data.name = voc",
        ),
        ("annotations", {"train_images": "x"}, "data.name = coco or voc"),
        ("annotations", {"table.empty": "unknown"}, "nothing without .*name = table"),
        ("table", {"table.unknown": "x"}, "nothing without config.data.table.labels"),
        ("table", {"table.file": "x.csv"}, "belong together"),
        ("table", {"table.labels": "a", "table.columns": "b"}, "exclude each other"),
        ("table", {"table.delimiter": "x"}, "must be one of ,, ;, tab"),
        ("voc", {"difficult": "no"}, "must be one of positive, ignored, negative"),
        ("voc", {"train": ""}, "config.data.train is empty"),
        ("nuswide", {"root": ""}, "config.data.root is empty"),
    ],
)
def test_settings_that_cannot_work(tmp_path, name, changes, message):
    config = configs.common()
    config.data.name, config.data.root = name, str(tmp_path)
    for key, value in changes.items():
        configs.override(config, f"data.{key}", value)
    with pytest.raises(UserError, match=message):
        configs.validate(config)
