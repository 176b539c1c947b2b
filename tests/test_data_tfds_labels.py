from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from data_trees import blocks
from test_data_tfds import config_of

from mljax.data import pipeline, tfds_labels
from mljax.data import tfds as rooms
from mljax.errors import UserError


def store(tmp_path, train, test, kind="tfrecord", **given):
    """Data "mine" with features `given`: name -> (feature, tf type, shape); `train` and
    `test` list what the examples hold, a tuple each."""
    kinds = {key: feature for key, (feature, _, _) in given.items()}
    signature = {
        "image": tf.TensorSpec([40, 53, 3], tf.uint8),
        **{
            key: tf.TensorSpec(shape, dtype) for key, (_, dtype, shape) in given.items()
        },
    }

    def split(rows):
        def examples():
            for i, row in enumerate(rows):
                yield {"image": blocks(i), **dict(zip(given, row, strict=True))}

        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    image = tfds.features.Image(encoding_format="png")
    tfds.dataset_builders.store_as_tfds_dataset(
        name="mine",
        version="1.0.0",
        data_dir=str(tmp_path),
        split_datasets={"train": split(train), "test": split(test)},
        features=tfds.features.FeaturesDict({"image": image, **kinds}),
        disable_shuffling=True,
        file_format=kind,
    )
    return config_of(tmp_path, "mine")


def one_label(names=("b", "a", "c")):
    return tfds.features.ClassLabel(names=list(names)), tf.int64, []


def texts():
    return tfds.features.Sequence(tfds.features.Text()), tf.string, [None]


def numbers():
    return tfds.features.Sequence(np.int64), tf.int64, [None]


def flags(dtype=np.float32, count=3):
    feature = tfds.features.Tensor(shape=(count,), dtype=dtype)
    return feature, tf.as_dtype(dtype), [count]


def load_fails(config, message):
    with pytest.raises(UserError, match=message) as error:
        rooms.load(config)
    assert "\n" not in str(error.value)


def assert_labels(config, class_names, train, val):
    """Read from the files by place, and through TFDS where its format allows that."""
    is_tfrecord = any(Path(config.root).glob("mine/1.0.0/*.tfrecord*"))
    for by_place in (True, False) if is_tfrecord else (True,):
        with pytest.MonkeyPatch.context() as patch:
            if not by_place:
                patch.setattr(rooms.tfds_files, "stored", lambda *_: None)
            sources = rooms.load(config)
        for split, expected in (("train", train), ("val", val)):
            assert sources[split].class_names == class_names
            assert sources[split].labels.dtype == np.int8
            np.testing.assert_array_equal(sources[split].labels, expected)


FORMATS = pytest.mark.parametrize("kind", ["tfrecord", "array_record"])


@FORMATS
def test_one_class_label(tmp_path, kind):
    config = store(tmp_path, [(0,), (2,), (1,)], [(1,), (-1,)], kind, label=one_label())
    train = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert_labels(config, ["a", "b", "c"], train, [[1, 0, 0], [-1, -1, -1]])
    source = rooms.load(config)["train"]
    batch = next(
        pipeline.train_batches(source, data_config=config, batch_size=3, seed=0)
    )
    assert batch["ok"].all() and batch["labels"].sum() == 3
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    config.classes = "names.txt"
    load_fails(config, "names.txt .*'label' of mine has 3 classes, with names of their")


def test_one_class_label_of_a_published_builder(tmp_path):
    with tfds.testing.mock_data(num_examples=4):
        train = rooms.load(config_of(tmp_path, "cifar100"))["train"]
    assert train.labels.shape == (4, 100)  # "label", not "coarse_label"
    assert (train.labels.sum(1) == 1).all()


@FORMATS
def test_texts(tmp_path, kind):
    train = [(["sky", "ant"],), ([],), (["sky", "sky"],), (["œuf"],)]
    config = store(tmp_path, train, [(["ant"],), (["œuf"],)], kind, labels=texts())
    expected = [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert_labels(config, ["ant", "sky", "œuf"], expected, [[1, 0, 0], [0, 0, 1]])
    (tmp_path / "names.txt").write_text("œuf\nsky\nbee\nant\n")
    config.classes = "names.txt"
    expected = np.insert(expected, 1, 0, axis=1)
    val = [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert_labels(config, ["ant", "bee", "sky", "œuf"], expected, val)
    (tmp_path / "names.txt").write_text("sky\nant\n")
    load_fails(
        config,
        "^mine, data.train='train': feature 'labels' of example 3 has label 'œuf', "
        r"which is not in .*names.txt \(1 such labels\): add it there or correct it",
    )


def test_a_text_that_does_not_occur_in_train(tmp_path):
    config = store(
        tmp_path, [(["10", "9"],)], [(["9"],), (["10", "11"],)], labels=texts()
    )
    load_fails(
        config,
        "^mine, data.val='test': feature 'labels' of example 1 has label '11', which "
        "is not in data.train='train', .* list all classes .* data.classes",
    )
    config.val = "test[:1]"
    assert_labels(config, ["9", "10"], [[1, 1]], [[1, 0]])


def test_texts_that_cannot_be_names(tmp_path):
    config = store(tmp_path, [([],)], [([" "],), ([b"\xff"],)], labels=texts())
    load_fails(config, "^mine, data.train='train': feature 'labels' holds no label")
    (tmp_path / "names.txt").write_text("sky\n")
    config.classes = "names.txt"
    load_fails(config, "data.val='test': .*'labels' of example 0 has label ' ', which ")
    config.val = "test[1:]"
    load_fails(config, r"'labels' of example 0 has label '\\udcff', .*blank or no text")


@FORMATS
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.uint8])
def test_a_tensor_with_a_value_for_each_class(tmp_path, dtype, kind):
    values = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]]).astype(dtype)
    rows = [(row,) for row in values]
    config = store(tmp_path, rows[:2], rows[2:], kind, labels=flags(dtype))
    assert_labels(config, ["0", "1", "2"], values[:2], values[2:])
    (tmp_path / "names.txt").write_text("sky\nant\nbee\n")
    config.classes = "names.txt"
    order = [1, 2, 0]
    assert_labels(config, ["ant", "bee", "sky"], values[:2, order], values[2:, order])
    (tmp_path / "names.txt").write_text("sky\nant\n")
    load_fails(config, "has 2 names, the feature 'labels' of mine has 3 classes$")


@pytest.mark.parametrize(
    ("wrong", "shown"), [(0.3, "0.3"), (2, "2.0"), (np.nan, "nan")]
)
def test_floats_that_are_no_labels(tmp_path, wrong, shown):
    config = store(
        tmp_path, [([1, 0, -1],)], [([0, 0, 1],), ([0, 1, wrong],)], targets=flags()
    )
    load_fails(
        config,
        "^mine, data.val='test': feature 'targets' of example 1 must hold 0, 1 and -1 "
        rf"\(unknown\), found {shown}: name another",
    )
    config.val = "test[:1]"
    assert_labels(config, ["0", "1", "2"], [[1, 0, -1]], [[0, 0, 1]])


@FORMATS
def test_numbers_of_classes(tmp_path, kind):
    val = [([1],), ([0, 3],), ([-1],)]
    train = [([0, 2],), ([],), ([1, 1],)]
    config = store(tmp_path, train, val, kind, labels=numbers())
    load_fails(config, "'labels' holds numbers of classes .*not the names .*classes$")
    (tmp_path / "names.txt").write_text("sky\nbee\nant\n")
    config.classes, config.val = "names.txt", "test[:1]"
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert_labels(config, ["ant", "bee", "sky"], expected, [[0, 1, 0]])
    for place, number in ((1, 3), (2, -1)):
        config.val = f"test[{place}:{place + 1}]"
        load_fails(
            config,
            rf"^mine, data.val='test\[.*': feature 'labels' of example 0 has label "
            rf"{number}, and there are 3 classes \(data.classes\)",
        )


def test_a_value_for_each_class_is_no_number_of_a_class(tmp_path):
    rows = [([0, 0, 1],), ([1, 0, 0],)]
    config = store(tmp_path, rows, rows, labels=numbers())
    (tmp_path / "names.txt").write_text("sky\nbee\nant\n")
    config.classes = "names.txt"
    load_fails(
        config, r"'labels' holds 3 times 0 or 1 in each .*Tensor\(shape=\(3,\)\)"
    )


@pytest.mark.parametrize(
    ("best", "others"),
    [
        ("tags", ["label"]),
        ("objects/kind", ["label", "tall"]),
        ("targets", ["label", "labels"]),
        ("labels", ["label", "tall"]),
        ("label", ["kind", "tall", "captions", "ids"]),
        ("kind", ["tall", "captions", "ids"]),
        ("tall", ["captions", "ids"]),
    ],
)
def test_which_feature_fits_best(tmp_path, best, others):
    one, _, _ = one_label()
    known = {
        "captions": texts()[0],
        "ids": numbers()[0],
        "tall": flags()[0],
        "kind": one,
        "label": one,
        "labels": texts()[0],
        "targets": flags(np.int64)[0],
        "tags": tfds.features.Sequence(one),
        "objects": tfds.features.Sequence({"kind": one}),
    }
    used = {
        name: known[name] for name in known if name in (best.split("/")[0], *others)
    }
    config = config_of(tmp_path, "mine")
    for features in (used, dict(reversed(used.items()))):
        found = tfds_labels.label_feature(config, tfds.features.FeaturesDict(features))
        assert found.key == best


def test_texts_of_another_name_must_be_named(tmp_path):
    config = store(tmp_path, [(["a sky"],)], [(["a sky"],)], captions=texts())
    load_fails(config, "'captions' holds texts.*: data.tfds_labels=captions reads them")
    config.tfds_labels = "captions"
    assert_labels(config, ["a sky"], [[1]], [[1]])
