"""The batch of a step depends on (seed, step) alone, whatever the source.

On any number of processes, begun anew at any step, with every augmentation of the host
on and with a file that cannot be read.
"""

import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from all_sources import MAKERS, augmented
from runs import ROOT

from mljax.data import DATASETS, pipeline

BATCH = 8


@pytest.fixture(scope="module", params=DATASETS)
def source(request, tmp_path_factory):
    """The training images and the config of every source there is."""
    assert request.param in MAKERS, "add it to tests/all_sources.py"
    root = tmp_path_factory.mktemp(request.param)
    config = augmented(MAKERS[request.param](root))
    return DATASETS[config.name](config, 0).train, config


def steps(source, count, **options):
    train, config = source
    batches = pipeline.train_batches(
        train, data_config=config, batch_size=BATCH, seed=3, **options
    )
    return list(itertools.islice(batches, count))


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


def joined(parts):
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def test_one_and_four_processes_and_any_start(source):
    whole = steps(source, 4)  # more than an epoch
    canvas = source[1].resize_on_device
    sides = (canvas, canvas) if canvas else (24, 32)
    assert all(b["image"].shape == (BATCH, *sides, 3) for b in whole)
    # Whether a file is known to be unreadable or not makes no difference.
    same(steps(source, 1, start_step=3)[0], whole[3])
    parts = [steps(source, 2, process_index=p, process_count=4) for p in range(4)]
    for at, batch in enumerate(whole[:2]):
        same(joined([part[at] for part in parts]), batch)
    # No two pictures of an image are alike, and another seed gives others.
    images = np.concatenate([b["image"][b["ok"]] for b in whole])
    assert len(np.unique(images, axis=0)) == len(images)


def test_a_late_step_starts_at_once(source):
    def seconds(start):
        begun = time.process_time()  # other programs may hold this one up
        steps(source, 1, start_step=start)
        return time.process_time() - begun

    # The least of some tries; reading all that comes before would be in each.
    usual = seconds(0)
    assert any(seconds(1_000_000) < usual + 1 for _ in range(3))


PROGRAM = """
import hashlib, itertools, json, sys
from ml_collections import ConfigDict
from mljax import config as configs
from mljax.data import DATASETS, pipeline
path, start, index, count = sys.argv[1], *map(int, sys.argv[2:])
config = configs.from_dict({"data": json.load(open(path))}).data
train = DATASETS[config.name](config, 0).train
batches = pipeline.train_batches(
    train, data_config=config, batch_size=8, seed=3, start_step=start,
    process_index=index, process_count=count)
for batch in itertools.islice(batches, 3):
    for row in range(8 // count):
        print(batch["index"][row], hashlib.md5(batch["image"][row]).hexdigest())
"""


@pytest.mark.slow
def test_four_real_processes(tmp_path):
    config = augmented(MAKERS["annotations"](tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))

    def rows(*numbers):
        command = [sys.executable, "-c", PROGRAM, str(file), *map(str, numbers)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    parts = [np.reshape(rows(5, p, 4), (3, 2)) for p in range(4)]
    assert rows(5, 0, 1) == np.concatenate(parts, 1).ravel().tolist()
