import re

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from data_trees import blocks, data_config

from mljax.data import pipeline, tfds_labels
from mljax.data import tfds as rooms
from mljax.errors import UserError


def config_of(tmp_path, name, **changes):
    given = dict(tfds_name=name, train="train", val="test")
    return data_config(tmp_path, **{**given, **changes})


@pytest.mark.parametrize(("name", "classes"), [("voc/2007", 20), ("coco/2014", 80)])
def test_builders(tmp_path, name, classes):
    config = config_of(tmp_path, name)
    with tfds.testing.mock_data(num_examples=6):
        sources = rooms.load(config)
    train = sources["train"]
    assert sources["val"].split == "val" and len(sources["val"]) == 6
    assert train.labels.shape == (6, classes) and len(train.class_names) == classes
    assert set(np.unique(train.labels)) == {0, 1} and len(set(train.content())) == 6
    batch = next(
        pipeline.train_batches(train, data_config=config, batch_size=4, seed=0)
    )
    assert batch["image"].shape == (4, 16, 16, 3) and batch["ok"].all()


def test_groups_of_truth_values_are_labels(tmp_path):
    config = config_of(tmp_path, "celeb_a")
    with tfds.testing.mock_data(num_examples=8):
        train = rooms.load(config)["train"]
    assert train.labels.shape == (8, 40) and "Smiling" in train.class_names
    assert train.class_names == sorted(train.class_names)
    assert set(np.unique(train.labels)) == {0, 1}


def test_a_feature_called_label_goes_first(tmp_path):
    features = tfds.builder("lvis", try_gcs=False).info.features
    found = tfds_labels.label_features(features)
    assert next(iter(found)) != "objects/label"  # also: what is not there, and more
    key, _, names = tfds_labels.label_feature(config_of(tmp_path, "lvis"), features)
    assert key == "objects/label" and len(names) == 1203


def test_voc_classes_and_difficult_objects(tmp_path, monkeypatch):
    example = {
        "image": b"",
        "image/filename": b"1.jpg",
        "labels": np.array([14, 0, 3, 14]),
        "labels_no_difficult": np.array([14, 0]),
    }
    monkeypatch.setattr(rooms, "_examples", lambda *_: [example])
    for name, difficult in (("labels", 1), ("labels_no_difficult", -1)):
        config = config_of(tmp_path, "voc/2007", tfds_labels=name)
        source = rooms.load(config)["train"]
        assert source.class_names == sorted(source.class_names)
        assert source.names == ["1.jpg"]
        present = dict(zip(source.class_names, source.labels[0], strict=True))
        expected = {"aeroplane": 1, "boat": difficult, "person": 1}
        assert {c: v for c, v in present.items() if v} == expected


@pytest.mark.parametrize(
    ("name", "about"),
    [
        (
            "open_images_v4",
            {
                "objects": {
                    "label": np.array([2, 0, 3, 0, 3]),
                    "confidence": np.array([10, 0, 7, 0, 0]),
                }
            },
        ),
        (
            "lvis",
            {
                "objects": {"label": np.array([2, 3])},
                "neg_category_ids": np.array([0]),
            },
        ),
    ],
)
def test_what_was_looked_for_and_is_not_there(tmp_path, monkeypatch, name, about):
    features = tfds.builder(name, try_gcs=False).info.features
    example = {"image": b"", "image/filename": b"1.jpg", **about}
    monkeypatch.setattr(rooms, "_examples", lambda *_: [example])
    source = rooms.load(config_of(tmp_path, name, val="train"))["train"]
    names = features["objects"].feature["label"].names
    row = source.labels[0][[source.class_names.index(n) for n in names]]
    assert row[[0, 2, 3]].tolist() == [0, 1, 1]
    assert (np.delete(row, [0, 2, 3]) == -1).all()
    assert source.objects.sum() == 2


def test_a_state_for_each_class(tmp_path):
    """chexpert: uncertain, positive, negative, unmentioned, and no class names."""
    states = np.array([[1, 2, 0], [3, 1, 1], [2, -1, 2]], np.int64)
    image = tf.io.encode_png(blocks(0))

    def given(builder, split, **_):
        return tf.data.Dataset.from_tensor_slices(
            {"image": tf.stack([image] * len(states)), "label": states}
        )

    (tmp_path / "names.txt").write_text("Edema\nFracture\nCardiomegaly\n")
    config = config_of(tmp_path, "chexpert", classes="names.txt", val="train")
    with tfds.testing.mock_data(as_dataset_fn=given):
        train = rooms.load(config)["train"]
        assert train.class_names == ["Cardiomegaly", "Edema", "Fracture"]
        expected = [[-1, 1, 0], [1, -1, 1], [0, 0, -1]]
        np.testing.assert_array_equal(train.labels, expected)
        (tmp_path / "names.txt").write_text("Edema\nFracture\n")
        with pytest.raises(UserError, match="'label' of example 0 has 3 states.* 2 "):
            rooms.load(config)
        config.classes = ""
        with pytest.raises(UserError, match="'label' holds a state of each.*classes$"):
            rooms.load(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "is not prepared in .*tfds build voc/2007"),
        ({"tfds_name": ""}, "tfds_name is empty"),
        ({"tfds_name": "no_such_data"}, "no_such_data not found"),
        (
            {"tfds_name": "downsampled_imagenet/32x32"},
            r"32x32 has no feature with labels \(it has image\): choose another",
        ),
        ({"tfds_labels": "no"}, r"'no' is not one .*\(labels, labels_no_difficult"),
    ],
)
def test_errors_are_one_line(tmp_path, changes, message):
    config = config_of(tmp_path, "voc/2007", **changes)
    with pytest.raises(UserError, match=message) as error:
        rooms.load(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_prepared_data_set(tmp_path, monkeypatch, kind):
    images = np.stack([blocks(i) for i in range(5)])
    labels = [[0, 2], [1], [1, 1], [2], [0]]

    def split(numbers):
        def examples():
            for i in numbers:
                yield {"image": images[i], "labels": labels[i]}

        signature = {
            "image": tf.TensorSpec([40, 53, 3], tf.uint8),
            "labels": tf.TensorSpec([None], tf.int64),
        }
        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    tfds.dataset_builders.store_as_tfds_dataset(
        name="mine",
        version="1.0.0",
        data_dir=str(tmp_path),
        split_datasets={"train": split(range(3)), "test": split([3, 4])},
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="png"),
                "labels": tfds.features.Sequence(
                    tfds.features.ClassLabel(names=["z", "b", "a"])
                ),
            }
        ),
        disable_shuffling=True,
        file_format=kind,
    )
    config = config_of(tmp_path, "mine")
    sources = rooms.load(config)
    assert sources["train"].class_names == ["a", "b", "z"]
    np.testing.assert_array_equal(
        sources["train"].labels, [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    )
    np.testing.assert_array_equal(sources["val"].labels, [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(sources["val"].read(1), images[4])
    # From where they are in the files, with nothing kept in memory.
    monkeypatch.setattr(rooms, "_memory", lambda: 0)
    config.train, config.val = "train[1:]+test[:1]", "test[1:]"
    sources = rooms.load(config)
    for index, image in enumerate(images[1:4]):
        np.testing.assert_array_equal(sources["train"].read(index), image)
    np.testing.assert_array_equal(sources["val"].read(0), images[4])
    assert len(sources["val"]) == 1 and len(set(sources["train"].content())) == 3
    batch = next(
        pipeline.train_batches(
            sources["train"], data_config=config, batch_size=3, seed=0
        )
    )
    assert batch["ok"].all()
    if kind == "tfrecord":  # the others TensorFlow cannot read at all
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rooms.tfds_files, "stored", lambda *_: None)
            with pytest.raises(UserError, match="mine: the images do not fit in a "):
                rooms.load(config)
    config.val = "validation"
    with pytest.raises(UserError, match="data.val='validation' is not one of its"):
        rooms.load(config)

    config.val = "test"
    file = next(tmp_path.glob(f"mine/1.0.0/*test.{kind}*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    with pytest.raises(UserError, match="mine.*cannot be read .*copy it again") as cut:
        rooms.load(config)
    assert not re.search(r"\n|\{\{|\[Op", str(cut.value))
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: is missing; copy it there"):
        rooms.load(config)


def test_a_number_for_each_class(tmp_path):
    targets = np.array([[1, 0, -1], [0, 0, 1], [-1, 1, 0], [7, 0, 0]], np.int64)

    def split(numbers):
        def examples():
            for i in numbers:
                yield {"image": blocks(i), "targets": targets[i]}

        signature = {
            "image": tf.TensorSpec([40, 53, 3], tf.uint8),
            "targets": tf.TensorSpec([3], tf.int64),
        }
        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    tfds.dataset_builders.store_as_tfds_dataset(
        name="mine",
        version="1.0.0",
        data_dir=str(tmp_path),
        split_datasets={"train": split(range(3)), "test": split([1, 3])},
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="png"),
                "targets": tfds.features.Tensor(shape=(3,), dtype=np.int64),
            }
        ),
        disable_shuffling=True,
    )
    config = config_of(tmp_path, "mine", val="test[:1]")
    sources = rooms.load(config)
    assert sources["train"].class_names == ["0", "1", "2"]
    np.testing.assert_array_equal(sources["train"].labels, targets[:3])
    (tmp_path / "names.txt").write_text("sky\nant\nbee\n")
    config.classes = str(tmp_path / "names.txt")
    train = rooms.load(config)["train"]
    assert train.class_names == ["ant", "bee", "sky"]
    np.testing.assert_array_equal(train.labels, targets[:3, [1, 2, 0]])
    (tmp_path / "names.txt").write_text("sky\n")
    with pytest.raises(UserError, match="has 1 names, the feature 'targets' .* 3 clas"):
        rooms.load(config)
    config.classes, config.val = "", "test"
    with pytest.raises(UserError, match="'targets' of example 1 must hold .*found 7"):
        rooms.load(config)
