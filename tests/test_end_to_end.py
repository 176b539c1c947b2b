"""The whole program as a user meets it: train, evaluate, and every kind of mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import BACKBONE, ROOT, TINY, environment, last_line, run

from mljax import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("e2e")
    done = run(folder / "run", folder / "cache", *TINY, "--config.epochs=2")
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "cache"


def refused(capsys, workdir: Path, *arguments: str) -> str:
    """The one line in which a command ends that cannot work; in this process."""
    assert main.main([f"--workdir={workdir}", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_training_leaves_what_the_readme_says(trained):
    workdir, _ = trained
    summary = json.loads((workdir / "metrics.json").read_text())
    assert {"mAP", "step", "epoch", "weights"} <= set(summary["best"])
    assert summary["last"]["step"] == 8 and summary["chosen_on"] == "val"
    assert len(summary["per_class"]) == 14
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"step", "loss", "mAP", "mAP_raw", "mAP_ema"} <= set(rows[0])
    assert max(row["mAP"] for row in rows) == summary["best"]["mAP"]
    with Image.open(workdir / "predictions.png") as picture:
        assert picture.width > 600
    assert list((workdir / "tensorboard").iterdir())
    assert not (workdir / "unreadable.txt").exists()


def test_eval_gives_the_same_numbers(trained):
    workdir, cache = trained
    done = run(workdir, cache, *TINY, "--mode=eval")
    assert done.returncode == 0, done.stderr
    best = json.loads((workdir / "metrics.json").read_text())
    found = json.loads((workdir / "eval.json").read_text())
    assert found["mAP"] == pytest.approx(best["best"]["mAP"], abs=1e-6)
    assert found["per_class"].keys() == best["per_class"].keys()
    assert "mAP" in done.stdout and "crowd" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.backbone=resnet50", "its weights are of another model (model.backbone"),
        ("model.head=csra", "model.head was 'linear' and is now 'csra'"),
        ("model.pool=max", "model.pool was 'avg' and is now 'max'"),
        ("loss.name=asl", "loss.name was 'aam' and is now 'asl'"),
    ],
)
def test_eval_of_another_model_is_refused(trained, capsys, change, words):
    flags = "--mode=eval", f"--config.{change}"
    assert words in refused(capsys, trained[0], *TINY, *flags)


def test_eval_says_what_it_computes_otherwise(trained, tmp_path):
    workdir, cache = trained
    shutil.copytree(workdir, tmp_path / "run")
    flags = "--mode=eval", "--config.eval.flip=true", "--config.data.fit=crop"
    done = run(tmp_path / "run", cache, *TINY, *flags)
    assert done.returncode == 0, done.stderr
    said = "config:  data.fit was 'stretch' and is now 'crop'; eval.flip was False and"
    assert f"{said} is now True" in done.stdout


def test_fine_tuning_from_a_work_directory(trained, tmp_path):
    workdir, cache = trained
    done = run(
        tmp_path / "more",
        cache,
        *TINY,
        f"--config.init_from={workdir}",
        "--config.optim.lr=1e-6",
        "--config.ema.decay=0",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "more" / "metrics.json").read_text())
    assert rows["last"]["mAP_ema"] is None and rows["last"]["weights"] == "raw"


def dataset(folder: Path, count: int = 24) -> Path:
    """A tiny annotation-JSON data set of JPEGs, PNGs and odd colour modes."""
    (folder / "photos").mkdir(parents=True)
    draw = np.random.default_rng(0)
    modes = ["RGB", "L", "CMYK", "RGB"]
    for split in ("train", "val"):
        images = []
        for i in range(count):
            name = f"photos/{split} {i} é.{'png' if i % 5 == 4 else 'jpg'}"
            pixels = draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            mode = modes[i % 4] if name.endswith("jpg") else "RGBA"
            Image.fromarray(pixels).convert(mode).save(folder / name)
            images.append([name, [["cat", "dog"][i % 2]]])
        content = {"classes": ["cat", "dog"], "images": images}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


FILES = [
    "--config=configs/coco.py:debug",
    "--config.batch_size=8",
    "--config.data.image_size=32",
    "--config.sam.rho=0",
]


def test_own_files_with_unreadable_images_skipped(trained, tmp_path):
    _, cache = trained

    def run(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "tests/tiny_program.py", "main", *FILES, root]
        return subprocess.run(
            [*program, "--config.model.backbone=tiny", *arguments]
            + [f"--workdir={workdir}"],
            cwd=ROOT,
            env=environment(cache) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=900,
        )

    data = dataset(tmp_path / "data")
    broken = data / "photos" / "train 0 é.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    root = f"--config.data.root={data}"
    done = run(tmp_path / "stop")
    assert done.returncode == 1
    assert "train 0 é.jpg: cannot be read" in last_line(done.stderr)
    # What the message advises goes on in the same directory.
    skip = "--config.data.on_error=skip"
    done = run(tmp_path / "stop", skip)
    assert done.returncode == 0, done.stderr
    missing = data / "photos" / "val 3 é.jpg"
    missing.unlink()
    done = run(tmp_path / "skip", skip)
    assert done.returncode == 0, done.stderr
    unreadable = (tmp_path / "skip" / "unreadable.txt").read_text()
    assert unreadable == f"{broken}\n{missing}\n"
    assert "2 images could not be read" in done.stdout
    done = run(tmp_path / "skip", skip, "--mode=eval")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "skip" / "eval.json").read_text())
    assert found["unreadable"] == [str(missing)]


def break_missing(data: Path) -> list[str]:
    (data / "train.json").unlink()
    return []


def break_syntax(data: Path) -> list[str]:
    (data / "val.json").write_text("{not json")
    return []


def break_keys(data: Path) -> list[str]:
    (data / "val.json").write_text('{"labels": []}')
    return []


def break_label(data: Path) -> list[str]:
    text = (data / "train.json").read_text().replace('["dog"]]', '["dgo"]]', 1)
    (data / "train.json").write_text(text)
    return []


def break_empty(data: Path) -> list[str]:
    (data / "val.json").write_text('{"classes": ["cat", "dog"], "images": []}')
    return []


def break_image(data: Path) -> list[str]:
    (data / "photos" / "val 3 é.jpg").unlink()
    return []


def break_weights(data: Path) -> list[str]:
    from safetensors.numpy import save_file

    save_file({"conv_stem.weight": np.zeros((3, 3))}, data / "w.safetensors")
    model = "--config.model.backbone=mobilenetv3_large_100"
    return [model, f"--config.init_from={data / 'w.safetensors'}"]


def break_weights_path(data: Path) -> list[str]:
    return [f"--config.init_from={data / 'none.safetensors'}"]


def break_batch(data: Path) -> list[str]:
    return ["--config.batch_size=1000"]


def break_name(data: Path) -> list[str]:
    return ["--config.model.backbone=resnet5"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (break_missing, ["train.json"]),
        (break_syntax, ["val.json", "JSON"]),
        (break_keys, ["val.json", "classes"]),
        (break_label, ["dgo", "train.json"]),
        (break_empty, ["val.json", "image"]),
        (break_image, ["val 3 é.jpg"]),
        (break_weights, ["conv_stem.weight", "[3, 3]"]),
        (break_weights_path, ["none.safetensors"]),
        (break_batch, ["batch_size"]),
        (break_name, ["model.backbone", "resnet5", "mobilenetv3_large_100"]),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, break_it, words):
    data = dataset(tmp_path / "data", count=8)
    arguments = break_it(data)
    root = f"--config.data.root={data}"
    message = refused(capsys, tmp_path / "run", *FILES, BACKBONE, root, *arguments)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_work_directory_of_another_config(trained, capsys):
    workdir, _ = trained
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    message = refused(capsys, workdir, *TINY, "--config.epochs=3")
    assert "epochs was 2 and is now 3" in message
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX file-size limit")
def test_full_disk_at_a_save(trained, tmp_path):
    _, cache = trained
    bash = shutil.which("bash")
    # The step, 17 MB of weights, does not fit; what is written before does.
    limit = (bash, "-c", 'ulimit -f 8000; exec "$@"', "bash")
    done = run(tmp_path / "run", cache, *TINY, prefix=limit)
    assert done.returncode == 1
    assert "disk full" in last_line(done.stderr), done.stderr
    assert str(tmp_path / "run") in last_line(done.stderr)
    done = run(tmp_path / "run", cache, *TINY)
    assert done.returncode == 0, done.stderr
