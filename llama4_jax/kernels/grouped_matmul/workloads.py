"""Named grouped products, shared by tests (the small ones) and benchmarks (the layers of real models)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of one grouped product `lhs [m k], rhs [e k n]`, and how the rows fall on the groups.

    `group_sizes` sum to at most `rows`; what is left over belongs to no group.
    """

    rows: int  # m
    inputs: int  # k
    outputs: int  # n
    group_sizes: tuple[int, ...]

    def __post_init__(self):
        if sum(self.group_sizes) > self.rows:
            raise ValueError(f"group_sizes={self.group_sizes} sum to more than rows={self.rows}")

    def arrays(self, seed: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """lhs [m k], rhs [e k n], group_sizes [e], and a cotangent for the output [m n]; standard normal numbers."""
        rng = np.random.default_rng(seed)
        shapes = (self.rows, self.inputs), (len(self.group_sizes), self.inputs, self.outputs), (self.rows, self.outputs)
        lhs, rhs, cotangent = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
        return lhs, rhs, jnp.asarray(self.group_sizes, jnp.int32), cotangent


SMALL = {
    "uneven": Workload(rows=50, inputs=16, outputs=24, group_sizes=(20, 3, 27)),
    "empty groups": Workload(rows=9, inputs=16, outputs=8, group_sizes=(0, 4, 0, 0, 5, 0)),
    "single rows": Workload(rows=5, inputs=8, outputs=8, group_sizes=(1, 1, 1, 1, 1)),
    "all in the first": Workload(rows=40, inputs=8, outputs=8, group_sizes=(40, 0, 0)),
    "all in the last": Workload(rows=300, inputs=16, outputs=8, group_sizes=(0, 0, 0, 300)),
    "every block size": Workload(rows=1500, inputs=8, outputs=8, group_sizes=(1427, 0, 73)),
    "rows of no group": Workload(rows=70, inputs=8, outputs=16, group_sizes=(10, 0, 33)),
    "no groups' rows": Workload(rows=12, inputs=8, outputs=8, group_sizes=(0, 0)),
    "one row": Workload(rows=1, inputs=16, outputs=8, group_sizes=(0, 1, 0)),
    "one row of no group": Workload(rows=1, inputs=8, outputs=8, group_sizes=(0, 0, 0)),
    "one group": Workload(rows=19, inputs=8, outputs=8, group_sizes=(19,)),
    "no rows": Workload(rows=0, inputs=8, outputs=8, group_sizes=(0, 0, 0)),
}


def spread(rows: int, groups: int, kind: str, seed: int = 0) -> np.ndarray:
    """The group of each of `rows` tokens, [m] int32.

    Args:
        kind: "even" (each group the same), "random" (independent and uniform), "skewed" (nine tenths to one group, the
            rest at random) or "one" (all to one group).
    """
    rng = np.random.default_rng(seed)
    uniform = rng.integers(0, groups, rows)
    kinds = {
        "even": np.arange(rows) % groups,
        "random": uniform,
        "skewed": np.where(rng.random(rows) < 0.9, 0, uniform),
        "one": np.zeros(rows),
    }
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} is unknown; use one of {sorted(kinds)}")
    return kinds[kind].astype(np.int32)
