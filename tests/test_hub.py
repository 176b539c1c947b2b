"""`hf://OWNER/NAME`: the cache first, one question to the hub, one line if it fails."""

import shutil
import sys
import types

import jax
import numpy as np
import pytest
from test_import_torch import small_model

from mljax import config as configs
from mljax import import_weights
from mljax.errors import UserError
from mljax.models import hub, import_torch, pretrained, torch_files
from mljax.models.functional import split

NAME = "hf://timm/tf_mobilenetv3_large_minimal_100.in1k"
REPOSITORY = "timm/tf_mobilenetv3_large_minimal_100.in1k"


class FakeHub(types.SimpleNamespace):
    """What is used of huggingface_hub; `cache` and `remote` are paths or None."""

    def __init__(self, cache=None, remote=None):
        super().__init__(cache=cache, remote=remote, asked=[], downloads=0)

    def hf_hub_download(self, repository, file, local_files_only=False):
        assert (repository, file) == (REPOSITORY, "model.safetensors")
        if self.cache is None and local_files_only:
            raise FileNotFoundError("not in the cache")
        if self.cache is None:
            self.downloads += 1
            self.cache = self.remote
        return str(self.cache)

    def hf_hub_url(self, repository, file):
        return f"https://hub/{repository}/{file}"

    def get_hf_file_metadata(self, url, timeout):
        assert timeout <= 10
        self.asked.append(url)
        if self.remote is None:
            raise ConnectionError("[Errno -2]\n Name or service not known")


@pytest.fixture
def file(tmp_path):
    """A timm file with a classifier of ten classes."""
    state = import_torch.export(small_model(10, seed=3))
    torch_files.write(tmp_path / "model.safetensors", state, [])
    return tmp_path / "model.safetensors"


def test_what_is_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    fake = FakeHub(cache=tmp_path / "x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.fetch(NAME) == tmp_path / "x" and fake.asked == []


def test_a_download_is_made_once(tmp_path, monkeypatch):
    fake = FakeHub(remote=tmp_path / "x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.fetch(NAME) == hub.fetch(NAME) == tmp_path / "x"
    assert fake.downloads == len(fake.asked) == 1


def test_without_network_it_says_at_once_which_file_to_bring(monkeypatch, capsys):
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(UserError) as error:
        pretrained.load(NAME, small_model)
    message = str(error.value)
    assert len(fake.asked) == 1 and fake.downloads == 0 and "\n" not in message
    for part in (
        NAME,
        "Name or service not known",
        f"download model.safetensors of the repository {REPOSITORY}",
        "--config.init_from=FOLDER/model.safetensors",
    ):
        assert part in message
    assert import_weights.main(["--from", NAME, "--to", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {NAME}: cannot be downloaded")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub, or download"):
        hub.fetch(NAME)


@pytest.mark.parametrize("name", ["hf://timm", "hf://a/b/c", "hf://timm/", "hf:///x"])
def test_other_forms(name):
    with pytest.raises(UserError, match="must be hf://OWNER/NAME"):
        hub.fetch(name)
    config = configs.load("configs/shapes.py")
    config.init_from = name
    with pytest.raises(UserError, match="config.init_from = .*hf://OWNER/NAME"):
        configs.validate(config)
    config.init_from = NAME
    configs.validate(config)


def test_a_run_starts_as_from_the_file_itself(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(remote=file))
    # The repository's name tells the backbone.
    assert import_weights.main(["--from", NAME, "--to", str(tmp_path / "dir")]) == 0
    assert "tf_mobilenetv3_large_minimal_100 + linear" in capsys.readouterr().out
    starts = [
        pretrained.load(path, small_model)[:2]
        for path in (NAME, str(file), str(tmp_path / "dir"))
    ]
    jax.tree.map(np.testing.assert_array_equal, starts[0], starts[1])
    jax.tree.map(np.testing.assert_array_equal, starts[0], starts[2])
    fresh = split(small_model())[0]["backbone"]["conv_stem"]["weight"]
    assert (starts[0][0]["backbone"]["conv_stem"]["weight"] != fresh).any()


def test_with_the_real_cache(file, tmp_path, monkeypatch):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="hf:// needs pip install huggingface_hub"
    )

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be downloaded"):
        hub.fetch(NAME)
    folder = tmp_path / "cache" / f"models--{REPOSITORY.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(file, folder / "snapshots" / "abc" / "model.safetensors")
    assert hub.fetch(NAME).read_bytes() == file.read_bytes()
