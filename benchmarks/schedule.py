"""What the TPU compiler's own schedule says that a product takes, without a TPU: an estimate, not measured.

libtpu writes a static profile of each kernel and fusion it compiles (`--xla_jf_dump_static_llo_profile_to`), with the cycles
that its bundles take, stalls and waits for its own copies included. It knows nothing of what else uses the memory, so that a
time is to be quoted as the greater of the schedule and the bytes moved over the bandwidth. For tpu7x it writes none.

Run as a program it reads cases as JSON from its input, a line each, and prints what became of them; `estimate` runs it so,
for libtpu reads its flags once and aborts now and then.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # cycles a second that fit the stated rates of matrix units
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A product `x [m k] @ weight [k n]`, or of rows sorted by group with `[e k n]`."""

    rows: int
    inputs: int
    outputs: int
    values: str | None = "int4"  # None: a bfloat16 weight, multiplied by XLA
    activations: str | None = None
    group: int | None = 128
    group_sizes: tuple[int, ...] | None = None
    columns: int | None = None  # of a block, instead of the table's


def estimate(chip: str, cases: Sequence[Case]) -> Iterator[dict]:
    """For each case its seconds by the schedule and the bytes it moves, or "error": why it could not be compiled."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # what comes from a cache has no profile
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"
        command = [sys.executable, "-m", "benchmarks.schedule", chip, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as worker:
            for case in cases:
                print(json.dumps(dataclasses.asdict(case)), file=worker.stdin, flush=True)
                answer = next((line for line in worker.stdout if line.startswith("{")), None)
                if answer is None:
                    log.seek(0)
                    raise RuntimeError(f"the compiler gave up at {case}: {log.read()[-1000:]}")
                yield json.loads(answer)


def seconds(folder: pathlib.Path, chip: str) -> float:
    """Of all profiles in `folder`, one after the other; removes them."""
    cycles = 0
    for path in folder.glob("*_static_llo_profile.textproto"):
        cycles += int(re.search(r"estimated_cycles:\s*(\d+)", path.read_text()).group(1))
        path.unlink()
    return cycles / CLOCK[chip]


def _program(case: Case):
    """A function and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    from llama4_jax.config.quant import QuantSpec
    from llama4_jax.kernels.int4_matmul import tpu
    from llama4_jax.kernels.int4_matmul.workloads import Workload

    if case.values is None:
        shapes = [(case.rows, case.inputs), (case.inputs, case.outputs)]
        return jnp.dot, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    workload = Workload(
        rows=case.rows,
        inputs=case.inputs,
        outputs=case.outputs,
        spec=QuantSpec(values=case.values, group=case.group, activations=case.activations),
        group_sizes=case.group_sizes and tuple(case.group_sizes),
    )
    product = tpu.matmul if case.group_sizes is None else tpu.grouped
    return (lambda *arrays: product(*arrays, columns=case.columns)), workload.shapes()


def _compiled(chip: str, case: Case) -> dict:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from llama4_jax.core import partitioning
    from llama4_jax.plan import topology

    mesh = partitioning.make_mesh({}, topology.devices(TOPOLOGY[chip])[:1])
    place = NamedSharding(mesh, PartitionSpec())
    function, shapes = _program(case)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    with jax.set_mesh(mesh):
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
    # What is kept between the kernels of a program is written and read.
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    return {"bytes": moved}


def main() -> None:
    chip, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    for line in sys.stdin:
        try:
            result = _compiled(chip, Case(**json.loads(line)))
            result["seconds"] = seconds(folder, chip)
        except Exception as error:  # a block that does not fit is an answer
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
