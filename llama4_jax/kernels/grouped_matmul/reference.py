"""The grouped product as a sum over all groups of masked rows: the specification, and groups-times the arithmetic.

Source: the expert computation of a dropless mixture of experts, Gale et al., "MegaBlocks" (2022), section 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool = False) -> jax.Array:
    """`out[i] = lhs[i] @ rhs[group of row i]`, 0 for rows past the groups; see `api.grouped_matmul`."""
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs  # [e k n]
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])[:, None]
    member = (row >= ends - group_sizes) & (row < ends)  # [m e]
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    products = jnp.einsum("mk,ek...->em...", lhs, rhs, preferred_element_type=wide)
    return jnp.einsum("me,em...->m...", member.astype(wide), products).astype(lhs.dtype)
