"""Eight simulated CPU devices, and where the optional reference files are."""

import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MLJAX_SHARED", ROOT.parent / "shared"))


def shared(name: str) -> Path:
    """The path of a reference file beside the repository; skips where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name}, which is kept outside the repository")
    return path


@pytest.fixture(autouse=True, scope="session")
def shared_cache(tmp_path_factory):
    """A folder for what the tests compile: the user's is left alone."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="module")
def settings_of_jax():
    """What programs tell JAX (`backend.set_up`) is not told to later tests."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def own_cache(monkeypatch, tmp_path_factory):
    """A folder for what a test compiles, which no other uses."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def small_backbones():
    """Backbones of one layer, which compile at once: "small_mobile", "small_resnet"."""
    from small_networks import SMALL

    from mljax.models import BACKBONES

    with pytest.MonkeyPatch.context() as patch:
        for name, make in SMALL.items():
            patch.setitem(BACKBONES, name, make)
        yield
