"""The kernels of few-bit weights for GPUs are compiled for H100 and B200 without a GPU, at the sizes of Scout.

Claim:     products with int4 weights, of one matrix and of 16 experts, compile for both to one Triton kernel each, which
           writes no copy of the weights; XLA alone writes them in bfloat16, four times their bytes.
Command:   pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt   (the versions of JAX; no other package)
           python -m experiments.gpu_few_bits
Hardware:  a CPU and 1 GB of disk; no GPU; 20 seconds to a minute.
Expected:  MiB besides arguments for 32 rows, by the compiler's count, the same for both GPUs: one matrix of 20.6 MiB 1.0 and by
           XLA 84; 16 experts of 660 MiB 2.0 and by XLA 2,573 (H100) and 2,581. Another compiler may differ by a tenth.

What this shows: tensors fit registers and shared memory, and the program is whole. Nothing ran, nor was timed.
"""

from __future__ import annotations

import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is a library; no GPU is looked for

from absl import app, flags
from tqdm import tqdm

from experiments import output
from llama4_jax.config.quant import QuantSpec
from llama4_jax.kernels.int4_matmul import triton, workloads, xla
from llama4_jax.kernels.int4_matmul.workloads import Workload
from llama4_jax.plan import gpus

ROWS = flags.DEFINE_list("rows", "1,32", "tokens, a choice of expert each")
GROUP = flags.DEFINE_integer("group", 128, "weights that share a scale", lower_bound=1)
IMPLEMENTATIONS = {"triton": triton, "xla": xla}


def main(_) -> None:
    output.quiet_libraries()
    spec, found = QuantSpec(group=GROUP.value), {}
    for rows in map(int, ROWS.value):
        products = {
            "one matrix": workloads.layers(rows, spec)["half of gate_up"],
            "16 experts": workloads.experts(rows, spec),
        }
        found |= {
            (gpu, product, str(rows), name): (workload, implementation)
            for gpu in gpus.GPUS
            for product, workload in products.items()
            for name, implementation in IMPLEMENTATIONS.items()
        }
    cases = tqdm(found.items(), desc="compiling", dynamic_ncols=True)
    found = {case: compiled(case[0], *what) for case, what in cases}
    print(
        f"\n{'GPU':6} {'product':12} {'rows':>5} {'by':8} {'MiB of arguments':>17} {'MiB besides':>12} {'compiled in s':>14}"
    )
    for (gpu, product, rows, name), row in found.items():
        sizes = f"{row['arguments_mib']:17.1f} {row['besides_mib']:12.1f} {row['seconds']:14.1f}"
        print(f"{gpu:6} {product:12} {rows:>5} {name:8} {sizes}  {row['kernels']} of Triton")
    output.finish({" ".join(case): row for case, row in found.items()})


def compiled(gpu: str, workload: Workload, implementation) -> dict:
    """Facts of the program that multiplies bfloat16 rows."""
    start = time.perf_counter()
    function = implementation.matmul if workload.group_sizes is None else implementation.grouped
    program = gpus.compiled(gpu, function, *workload.shapes())
    memory = program.memory_analysis()
    return {
        "arguments_mib": memory.argument_size_in_bytes / 2**20,
        "besides_mib": memory.temp_size_in_bytes / 2**20,
        "seconds": time.perf_counter() - start,
        "kernels": program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"'),
    }


if __name__ == "__main__":
    app.run(main)
