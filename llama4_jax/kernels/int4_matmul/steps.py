"""Which block of rows meets which group's matrix: the steps of a grouped kernel, which its index maps read.

Source: the group metadata of JAX's Megablox (jax.experimental.pallas.ops.tpu.megablox.gmm). Differences: the number of steps
is static, bounded by rows as well as groups, so that one row among 128 experts is one step; and rows of no group get a step,
in which the kernel writes zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Steps(NamedTuple):
    """All int32 [steps]. Blocks of rows come in order, so that a block is finished before the next is begun."""

    matrix: jax.Array  # whose weights the step reads; unchanged where it needs none, so that none are fetched
    block: jax.Array  # of rows
    start: jax.Array  # first row of the step's group
    end: jax.Array  # first row past it; start = end where there is nothing to do
    owned: jax.Array  # 1 for a group, 0 for the rows of none


def plan(group_sizes: jax.Array, rows: int, block: int) -> Steps:
    """The steps for groups [e] among `rows` rows, the last block of which may be filled up."""
    groups = group_sizes.shape[0]
    num_blocks = -(-rows // block)
    sizes = jnp.append(group_sizes, num_blocks * block - jnp.sum(group_sizes)).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // block
    blocks = jnp.where(sizes > 0, (ends - 1) // block - first + 1, 0)
    after = jnp.cumsum(blocks)  # steps until a group is done
    # Each group but one begins within a block that another has begun.
    step = jnp.arange(num_blocks + min(groups, rows), dtype=jnp.int32)
    active = step < after[-1]
    step = jnp.minimum(step, after[-1] - 1)
    owner = jnp.sum(after <= step[:, None], axis=1)
    last = jnp.max(jnp.where(group_sizes > 0, jnp.arange(groups), 0))
    return Steps(
        matrix=jnp.where(owner < groups, owner, last).astype(jnp.int32),
        block=first[owner] + step - (after - blocks)[owner],
        start=jnp.where(active, starts[owner], 0),
        end=jnp.where(active, ends[owner], 0),
        owned=(owner < groups).astype(jnp.int32),
    )
