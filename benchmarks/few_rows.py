"""How fast decoding on this CPU reads its weights: our compiled products of a few rows beside XLA's.

    python -m benchmarks.few_rows [--repeats 25]

Products of 1 to 8 rows with matrices that together are larger than the caches; each product's rows depend on the last
one's result, as a model's layers do. Both take turns; GB/s of weights, the best of the repeats. XLA multiplies the
matrices as they are, [n k], and turned round, [k n]; the better counts. No target: `hf_side_by_side` has those.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import machine
from benchmarks.moe_cpu import best_of
from llama4_jax.kernels import few_rows

ROWS = (1, 2, 4, 8)
SHAPES = ((512, 2048), (1024, 512), (512, 32000))  # inputs, outputs
BYTES = 100e6  # of the matrices of a call


def chain(product: Callable) -> Callable:
    """One compiled call that multiplies rows with one matrix after another."""

    def run(rows, matrices):
        for matrix in matrices:
            rows = rows + (1e-6 * jnp.sum(product(rows, matrix))).astype(rows.dtype)
        return rows

    return jax.jit(run)


WAYS = {
    "ours": (chain(few_rows.multiply), False),
    "xla [n k]": (chain(lambda rows, matrix: jnp.einsum("mk,nk->mn", rows, matrix)), False),
    "xla [k n]": (chain(lambda rows, matrix: jnp.einsum("mk,kn->mn", rows, matrix)), True),
}


def rates(rows: int, inputs: int, outputs: int, dtype, repeats: int) -> dict[str, float]:
    """GB/s of each way."""
    count = max(1, round(BYTES / (inputs * outputs * dtype.itemsize)))
    drawn = [jax.random.normal(jax.random.key(i), (outputs, inputs), dtype) for i in range(count)]
    turned = [matrix.T.copy() for matrix in drawn]
    x = jax.random.normal(jax.random.key(count), (rows, inputs), dtype)
    calls = {name: (lambda run=run, w=turned if turn else drawn: run(x, w)) for name, (run, turn) in WAYS.items()}
    read = count * inputs * outputs * dtype.itemsize / 1e6
    return {name: read / milliseconds for name, (milliseconds, _) in best_of(calls, repeats).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    before = machine.snapshot()
    print(f"{'dtype':<10}{'rows':>5}  {'k x n':<12}" + "".join(f"{name:>11}" for name in WAYS) + f"{'ours / xla':>12}")
    for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        for rows in ROWS:
            for inputs, outputs in SHAPES:
                speed = rates(rows, inputs, outputs, dtype, repeats)
                ratio = speed["ours"] / max(rate for name, rate in speed.items() if name != "ours")
                figures = "".join(f"{rate:>11.1f}" for rate in speed.values())
                print(f"{dtype.name:<10}{rows:>5}  {f'{inputs} x {outputs}':<12}{figures}{ratio:>12.2f}", flush=True)
    foreign = machine.foreign_share(before, machine.snapshot())
    print(f"GB/s of weights; other programs used {foreign:.0%} of the cores meanwhile")


if __name__ == "__main__":
    main()
