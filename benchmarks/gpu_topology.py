"""Compiling for a GPU on a machine that has none: JAX's CUDA plugin holds the compiler.

    pip install 'jax[cuda12]'

What XLA measures on a GPU before it chooses (the algorithms of convolutions and matrix
products) it leaves open here.
"""

import os
from typing import Any

# Figures of the maker's data sheet, and what CUDA says of the device.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: 52428800
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
# Without measuring, one of its kernels for matrix products has sizes that do not fit.
FLAGS = "--xla_gpu_enable_triton_gemm=false"


def device() -> Any:
    """An H200 that programs can be compiled for; nothing can be run on it.

    Must come before anything else of JAX is used.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jax._src import xla_bridge
    from jax.experimental import topologies

    known = xla_bridge.canonicalize_platform

    def canonical(platform: str) -> str:
        # "gpu" is not known where no GPU is (github.com/jax-ml/jax/issues/23971).
        try:
            return known(platform)
        except RuntimeError:
            return "cuda"

    xla_bridge.canonicalize_platform = canonical
    try:
        found = topologies.get_topology_desc(
            "h200", "cuda", target_config=H200, topology="1x1x1"
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"no compiler for GPUs here ({reason}): pip install 'jax[cuda12]'"
        ) from error
    return found.devices[0]
