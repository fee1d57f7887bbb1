"""Groups of a few rows, each through a function of its own: a mixture of experts in decoding, on a CPU.

A matrix sliced out of a stack is copied, which costs as much as multiplying a row or two with it. Here each group has a
function that closes over arrays of its own, and a branch picks it. Forward only: the loops have dynamic trip counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 4
"""Rows to a block where a group has more than one; a product of fewer takes as long."""


def map_groups(
    functions: Sequence[Callable[[jax.Array], jax.Array]], rows: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """`functions[g](rows)` for the rows of each group g, [m b]; 0 for rows past the groups.

    functions: each maps [r a] to [r b] row by row, for any r; rows [m a], sorted by group; group_sizes [e] int32.
    """
    if rows.shape[0] == 1:  # one sequence: loops around one short product would double its time
        out = lax.switch(jnp.argmax(group_sizes), functions, rows)
        return jnp.where(jnp.any(group_sizes > 0), out, 0)
    width = jax.eval_shape(functions[0], rows).shape[1]
    ends = jnp.cumsum(group_sizes)
    occupied = group_sizes > 0
    order = jnp.argsort(~occupied, stable=True)  # groups that have rows first

    def visit(i, out):
        group = order[i]
        branches = [partial(_group, function) for function in functions]
        return lax.switch(group, branches, rows, ends[group] - group_sizes[group], ends[group], out)

    return lax.fori_loop(0, jnp.sum(occupied), visit, jnp.zeros((rows.shape[0], width), rows.dtype))


def _group(function, rows, start, stop, out):
    """`out` with the rows start..stop replaced by what the function makes of them."""

    def alone(out):
        return lax.dynamic_update_slice_in_dim(out, function(lax.dynamic_slice_in_dim(rows, start, 1)), start, 0)

    def block(i, out):
        size = min(BLOCK, rows.shape[0])
        begin = jnp.minimum(start + i * size, rows.shape[0] - size)
        index = begin + jnp.arange(size)[:, None]
        new = function(lax.dynamic_slice_in_dim(rows, begin, size))
        old = lax.dynamic_slice_in_dim(out, begin, size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where((index >= start) & (index < stop), new, old), begin, 0)

    def several(out):
        return lax.fori_loop(0, lax.div(stop - start + BLOCK - 1, BLOCK), block, out)

    return lax.cond(stop - start == 1, alone, several, out)
