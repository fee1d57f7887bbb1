"""The grouped product by `jax.lax.ragged_dot`: what TPU and GPU compilers turn into a kernel of their own.

Rows past the groups are 0 by that operation's definition. Its own rules of differentiation are used: d lhs is a ragged
product with transposed matrices, d rhs one whose contracted dimension is the ragged one, of which TPUs make groups-times the
arithmetic (see `megablox`). On the CPU it costs groups-times the arithmetic and memory, in both directions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama4_jax.core import partitioning


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool = False) -> jax.Array:
    """Grouped product with sums in float32; see `api.grouped_matmul`."""
    matrices = rhs.swapaxes(1, 2) if transpose_rhs else rhs.reshape(*rhs.shape[:2], -1)  # [e k n]
    # Matrix units add up in float32 and round once. Asked for float32 they would also write it, and read it in the gradient:
    # twice the memory, and products of float32. A CPU has to be asked.
    wide = jnp.promote_types(lhs.dtype, jnp.float32) if partitioning.platform() == "cpu" else lhs.dtype
    out = jax.lax.ragged_dot(lhs, matrices, group_sizes, preferred_element_type=wide).astype(lhs.dtype)
    return out if transpose_rhs else out.reshape(-1, *rhs.shape[2:])
