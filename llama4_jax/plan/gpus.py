"""GPUs that programs are compiled for where there is none: descriptions that XLA's compiler for GPUs takes for a device.

The compiler comes with JAX's plugin for CUDA, and needs no driver. cuDNN makes its own kernels only when a program starts.

Source: the device descriptions in XLA, xla/backends/gpu/target_config/specs; what they leave out is the same for both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GPUS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "major": 9, "cores": 132, "memory": 84_942_979_072, "l2": 52_428_800},
    "b200": {"name": "NVIDIA B200", "major": 10, "cores": 148, "memory": 191_514_411_008, "l2": 132_644_864},
}
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: {cores}  fpus_per_core: 128  clock_rate_ghz: 1.97  memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: {l2}  device_memory_size: {memory}  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9  minor: 10 }}  runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def compiled(gpu: str, function: Callable, *shapes) -> jax.stages.Compiled:
    """`function` of arrays of `shapes`, compiled for one of `GPUS`. Raises RuntimeError where the compiler is not installed."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise RuntimeError(
            "the compiler for GPUs is not installed; pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cudnn-cu13"
        )
    description = _DESCRIPTION.format(**GPUS[gpu])
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=gpu, topology="1x1x1", target_config=description
    )
    mesh = Mesh(np.array(topology.devices), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=whole), shapes)
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
