"""Compiles for an NVIDIA H100 where there is none: a plan of memory, and the kernels.

JAX's CUDA plug-in compiles for a device that it is only told of. Without one it cannot
try kernels out, so that all products of matrices are cuBLAS's; what is planned is what
an H100 would allocate with those. Install beside JAX, of the same version, and without
what they depend on: ``pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt``, and
``pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm`` for the compiler.
"""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What the compiler asks of a device, from NVIDIA's data sheet and the CUDA C++
# programming guide (compute capability 9.0).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# For the process: or the plug-in looks for libraries that only running needs.
ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
# For ``compile``.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def available() -> bool:
    """Whether the plug-in is installed."""
    parent = importlib.util.find_spec("jax_plugins")
    return parent is not None and bool(
        importlib.util.find_spec("jax_plugins.xla_cuda13")
    )


def placed(tree: Any) -> Any:
    """Shapes as those of arrays on an H100, for the arguments of ``jit(f).lower``.

    Args:
      tree: a pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      A pytree of `jax.ShapeDtypeStruct`. What is lowered with them is compiled for the
      H100 by ``lowered.compile(OPTIONS)``, and cannot run. The process has to have
      the `ENVIRONMENT` before JAX looks for devices.
    """
    sharding = _sharding()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


@functools.lru_cache(maxsize=1)
def _sharding() -> NamedSharding:
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        topology="1x1x1",
        target_config=_H100,
    )
    return NamedSharding(Mesh(np.array(topology.devices), "x"), PartitionSpec())
