"""Compiling for TPUs on a machine that has none: libtpu holds their compiler."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

# With it libtpu neither looks for TPUs nor asks the network about them.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


def devices(topology: str) -> list[Any]:
    """Those of a topology such as "v5e:4x4"; nothing can be run on them."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "pip install libtpu, and give it as v5e:4x4"
        raise SystemExit(f"--topology {topology}: {reason}; {advice}") from error


@contextlib.contextmanager
def compiling_for(topology: str) -> Iterator[None]:
    """Inside, meshes are of these TPUs, arrays are shapes, and models take the forms
    that they have on TPUs."""
    import jax
    import numpy as np

    from mljax import sharding

    def place(tree: Any, shardings: Any) -> Any:
        as_arrays = jax.tree.map(np.asarray, tree)
        return sharding.abstract(as_arrays, shardings)

    found = devices(topology)
    with (
        mock.patch.object(jax, "devices", lambda: found),
        mock.patch.object(jax, "device_count", lambda: len(found)),
        mock.patch.object(jax, "default_backend", lambda: "tpu"),
        mock.patch.object(sharding, "place", place),
    ):
        yield
