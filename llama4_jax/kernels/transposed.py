"""Rows times the transpose of a matrix: how decoding on a CPU reads its weights.

A product of 2 to 16 rows takes as long as reading the matrix takes. XLA's CPU backend reads one stored as [n k] up to
1.6 times as fast as one stored as [k n], but only as the left operand, and it would turn the operands round again if it
could see that the result is transposed; a barrier hides that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.core import partitioning

FEW_ROWS = 16


def multiply(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """`rows [m k]` times the transpose of `matrix [n k]`: [m n], summed and returned in float32 at least."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    if rows.shape[0] == 1 and rows.dtype == jnp.bfloat16:  # a single such row would convert the whole matrix first
        return multiply(jnp.concatenate([rows, rows]), matrix)[:1]
    if rows.shape[0] <= FEW_ROWS and partitioning.platform() == "cpu":
        product = lax.dot_general(matrix, rows, (((1,), (1,)), ((), ())), preferred_element_type=wide)  # [n m]
        return lax.optimization_barrier(product).T
    return lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=wide)
