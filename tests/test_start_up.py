"""What a start does not do again, nor before it is needed."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from layouts import batches
from runs import ROOT
from small_model import make, make_batch, mlp
from test_step import optimizer_for
from test_strategy import settings  # noqa: F401

from mljax import backend, memory, train
from mljax.step import create_state, make_train_step


def test_another_seed_is_the_same_program(
    settings,  # noqa: F811
    monkeypatch,
    own_cache,
    request,
):
    monkeypatch.setattr(backend, "_SHORTEST", 0.0)
    settings.mutual.weight, settings.data.cutmix_alpha = 0.0, 0.0
    settings.optim.freeze, settings.optim.freeze_epochs = "", 0
    compilation_cache.reset_cache()  # or it keeps the folder of an earlier test
    found: list[str] = []

    def listen(name, **_):
        found.append(name)

    jax.monitoring.register_event_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_listener(listen))

    def compile_step(seed):
        """The training steps that are in the cache afterwards."""
        settings.seed = seed
        made = train.setup(settings)
        assert made.seed == seed
        batch = next(batches(made, settings))
        found.clear()
        made.step_at(1).lower(made.state, batch, made.seed).compile()
        cached = own_cache.glob("jit_train_step-*-cache")
        return {file.name for file in cached}

    first = compile_step(0)
    assert len(first) == 1 and "/jax/compilation_cache/cache_misses" in found
    assert compile_step(1) == first
    assert "/jax/compilation_cache/cache_hits" in found
    assert "/jax/compilation_cache/cache_misses" not in found
    compilation_cache.reset_cache()


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_the_seed_draws_the_same_numbers_as_an_input(seed):
    params, stats = make()
    optimizer = optimizer_for(params)
    state = replace(create_state(params, stats, optimizer, False), step=np.int32(11))
    batch = make_batch()

    def drawn(images, labels, key):
        return images / 255, jax.random.randint(key, labels.shape, 0, 100)

    def loss(outputs, labels):  # whole numbers: exact, however it is compiled
        return labels.sum() + 0 * outputs.sum()

    def first_loss(seed):
        make_step = partial(make_train_step, mlp, loss, optimizer, drawn)
        return make_step(reduction="sum", seed=seed)(state, batch)[1]["loss"]

    found = jax.jit(first_loss)(np.int32(seed))
    assert found > 0 and found == jax.jit(partial(first_loss, seed))()


PROGRAMS = (
    *("main", "predict", "explain", "export", "report", "serve", "thresholds"),
    *("import_weights", "find_lr", "data.shard", "data.inspect"),
)
# What each of them takes a second or more to import.
HEAVY = ("jax", "flax", "optax", "orbax", "tensorflow", "matplotlib", "scipy")


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys, time\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv[1:] = ['--help']\n"
        "    try: runpy.run_module(f'mljax.{name}', run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, name\n"
        f"    found = [m for m in {HEAVY} if m in sys.modules]\n"
        "    assert not found, f'{name} imports {found}'\n"
        "print(time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *PROGRAMS],
        cwd=ROOT,
        env=os.environ | {"GLIBC_TUNABLES": "x=y"},  # or mljax.main starts anew
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *text, seconds = done.stdout.splitlines()
    assert sum(line.startswith("usage: ") for line in text) == len(PROGRAMS)
    assert float(seconds) < 1  # all of them: 0.2 s


def test_tensorflow_comes_without_keras_and_keras_when_it_is_asked_for():
    code = (
        "import sys, mljax\n"
        "mljax.main.load_tensorflow()\n"
        "assert 'tensorflow' in sys.modules and 'keras' not in sys.modules\n"
        "from tensorflow.keras import layers\n"
        "assert layers is sys.modules['tensorflow'].keras.layers\n"
        "print(mljax.metrics.mean_average_precision([[1.0]], [[1]]))\n"
        "try: mljax.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "1.0\nmljax has no 'nothing'\n", done.stderr


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc",
    reason="only glibc's allocator is set up",
)
def test_buffers_of_a_step_are_not_mapped_anew(monkeypatch):
    """Neither with nor without huge pages; 256 MB are 128 or 65,536 of them.

    All 40 calls map them where they are given back. Where they are kept, the heap
    grows a few times until it holds all that are in use at once: a thread that helped
    may free its part when the next call has begun.
    """
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # An arena for every thread: JAX's own have none that could hold the buffers.
    tuned = memory.tunables()["GLIBC_TUNABLES"]
    own_arenas = tuned.replace("arena_max=4", "arena_max=100")
    assert own_arenas != tuned
    code = (
        "import resource\n"
        "from mljax import backend\n"
        "backend.set_up()\n"
        "import jax, jax.numpy as jnp\n"
        "kept = jax.lax.optimization_barrier\n"
        "step = jax.jit(lambda x: kept(jnp.sin(kept(jnp.tile(x, (64, 1))))).sum())\n"
        "def faults(x):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    step(x).block_until_ready()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(*[faults(jnp.ones((1024, 1024))) for _ in range(40)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"GLIBC_TUNABLES": own_arenas},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sum(int(n) >= 100 for n in done.stdout.split()) <= 10, done.stdout
