"""The kernels of attention for GPUs are compiled for H100 and B200 without a GPU, at the sizes of Scout.

Claim:     one layer's attention, forward and gradient, compiles for both: packed rows to Pallas kernels by Triton, rows of one
           document to calls of cuDNN; in less memory than blockwise attention, which XLA would compile otherwise.
Command:   pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cudnn-cu13   (the versions of JAX; no other package)
           LD_LIBRARY_PATH=$(python -c "import nvidia.cudnn as c; print(list(c.__path__)[0])")/lib \
               python -m experiments.gpu_attention
Hardware:  a CPU and 3 GB of disk; no GPU; 30 seconds to a minute.
Expected:  MiB besides arguments, by the compiler's count, the same for both GPUs and layers: Triton 165.1, cuDNN 322.5,
           blockwise 714.4 with JAX 0.12 and 776.4 with 0.10.2; another compiler may differ by a tenth.

What this shows: tensors fit registers and shared memory (blocks that do not are refused: --block=256), and the program is
whole. What it does not: cuDNN makes its own kernels when a program starts on a GPU, and nothing ran, nor was timed.
"""

from __future__ import annotations

import os
import re
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is a library; no GPU is looked for

import jax
import jax.numpy as jnp
from absl import app, flags
from tqdm import tqdm

from experiments import output
from llama4_jax.kernels.attention import blockwise, chunks, cudnn, triton
from llama4_jax.kernels.attention.workloads import REAL, Workload
from llama4_jax.plan import gpus

WORKLOADS = {"chunked": REAL["scout_train_chunked"], "global": REAL["scout_train_global"]}
BLOCK = flags.DEFINE_integer("block", 64, "tokens of the Pallas kernels' blocks", lower_bound=16)


def main(_) -> None:
    output.quiet_libraries()
    packed = {"triton": lambda *x, **call: triton.attend(*x, **call, block=BLOCK.value), "blockwise": blockwise.attend}
    calls = {(layer, name): attend for layer in WORKLOADS for name, attend in packed.items()}
    calls |= {("chunked", "cudnn"): chunks.apart(cudnn.attend), ("global", "cudnn"): cudnn.attend}
    cases = [(gpu, *call) for gpu in gpus.GPUS for call in sorted(calls)]
    rows = {}
    for gpu, layer, name in tqdm(cases, desc="compiling", dynamic_ncols=True):
        rows[gpu, layer, name] = compiled(gpu, WORKLOADS[layer], calls[layer, name])
    print(f"\n{'GPU':6} {'layer':8} {'attention':10} {'MiB besides arguments':>22} {'compiled in s':>14}  kernels")
    for (gpu, layer, name), row in rows.items():
        print(
            f"{gpu:6} {layer:8} {name:10} {row['mib']:22.1f} {row['seconds']:14.1f}  {', '.join(row['kernels']) or 'XLA'}"
        )
    output.finish({" ".join(case): row for case, row in rows.items()})


def compiled(gpu: str, workload: Workload, attend) -> dict:
    """Facts of the program that computes the gradient of one layer's attention in bfloat16."""

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct((workload.batch, workload.query_length, *sizes), dtype)

    def loss(query, key, value, positions, segments):
        tokens = {"query_positions": positions, "key_positions": positions}
        tokens |= {"query_segments": segments, "key_segments": segments}
        return attend(query, key, value, **tokens, chunk_size=workload.chunk_size).astype(jnp.float32).sum()

    query = shape(jnp.bfloat16, workload.heads, workload.head_dim)
    key = shape(jnp.bfloat16, workload.kv_heads, workload.head_dim)
    token, start = shape(jnp.int32), time.perf_counter()
    program = gpus.compiled(gpu, jax.grad(loss, (0, 1, 2)), query, key, key, token, token)
    return {
        "mib": program.memory_analysis().temp_size_in_bytes / 2**20,
        "seconds": time.perf_counter() - start,
        "kernels": sorted(set(re.findall(r'custom_call_target="([^"]+)"', program.as_text()))),
    }


if __name__ == "__main__":
    app.run(main)
