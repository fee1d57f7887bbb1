"""A batch script for GPUs under Slurm: one process a GPU, stopped in time to save, and queued again when preempted.

    python -m launch.slurm --gpu=h100 --nodes=4 --hours=24 -- python -m experiments.pretrain_nano --cluster > nano.sbatch
    sbatch nano.sbatch

JAX finds address, number and devices of the processes in Slurm's variables (--cluster).
Source: Slurm's sbatch, options --signal, --requeue and --kill-on-bad-exit of srun; jax.distributed.initialize.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from absl import app, flags

from launch import asked, xla_flags

GPU = flags.DEFINE_enum("gpu", "h100", xla_flags.GPUS, "GPU, for its XLA flags")
NODES = flags.DEFINE_integer("nodes", 1, "machines", lower_bound=1)
PER_NODE = flags.DEFINE_integer("gpus_per_node", 8, "GPUs in each", lower_bound=1)
HOURS = flags.DEFINE_integer("hours", 24, "time limit", lower_bound=1)


def script(name: str, chip: str, nodes: int, per_node: int, hours: int, grace: int, command: Sequence[str]) -> str:
    """The text for sbatch. Raises ValueError without a command."""
    return f"""\
#!/usr/bin/env bash
#SBATCH --job-name={shlex.quote(name)}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --exclusive
#SBATCH --time={hours}:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# The steps (not this shell) hear SIGTERM so long before the limit: each process saves and ends.
#SBATCH --signal=TERM@{grace}
set -euo pipefail

export XLA_FLAGS={shlex.quote(xla_flags.line(chip))}

# One process that ends badly ends them all: the others would wait for it.
srun --kill-on-bad-exit=1 --label {shlex.join(asked.command(command))}
"""


def main(arguments: Sequence[str]) -> None:
    sizes = (NODES.value, PER_NODE.value, HOURS.value, asked.GRACE.value)
    print(script(asked.NAME.value, GPU.value, *sizes, arguments[1:]), end="")


if __name__ == "__main__":
    app.run(main)
