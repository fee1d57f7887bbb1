"""Grouped matrix product: rows sorted by group, each multiplied by the matrix of its own group.

This is all the arithmetic of a mixture of experts. Its cost follows the number of rows, whatever the number of groups
and however unevenly the rows fall, and no row is ever dropped.

A backend is a function with the signature of `reference.grouped_matmul`; it joins `IMPLEMENTATIONS`.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

from llama4_jax.core import partitioning
from llama4_jax.kernels.grouped_matmul import blocked, megablox, ragged, reference

IMPLEMENTATIONS = {
    "reference": reference.grouped_matmul,
    "blocked": blocked.grouped_matmul,
    "ragged": ragged.grouped_matmul,
    "megablox": megablox.grouped_matmul,
}

_logger = logging.getLogger(__name__)


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """`out[i] = lhs[i] @ rhs[g]` for each row i of group g: `[m n..]` in lhs's dtype, summed in float32.

    The first `group_sizes[0]` rows are group 0's, the next `group_sizes[1]` are group 1's, and so on; groups may be
    empty. Rows past the last group give 0 and receive no gradient. Differentiable in lhs and rhs, in reverse mode.

    Args:
        lhs: [m k], rows sorted by group.
        rhs: [e k n..], with one axis or more after k, or [e n k] with `transpose_rhs`.
        group_sizes: [e] int32, not negative, with a sum of at most m.
        transpose_rhs: multiply with each matrix's transpose, of which no copy is made on the CPU.
        implementation: a name in `IMPLEMENTATIONS`, or None to choose by platform.

    Raises:
        ValueError: for an unknown implementation, or shapes or dtypes that do not belong together.
    """
    _check(lhs, rhs, group_sizes, transpose_rhs)
    if implementation is None:
        implementation = choose(partitioning.platform(), rhs.shape[0])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; use None or one of {sorted(IMPLEMENTATIONS)}")
    if lhs.shape[0] == 0:
        return jnp.zeros((0, *(rhs.shape[1:2] if transpose_rhs else rhs.shape[2:])), lhs.dtype)
    with jax.named_scope("grouped_matmul"):
        return IMPLEMENTATIONS[implementation](lhs, rhs, group_sizes, transpose_rhs)


@functools.cache
def choose(platform: str, groups: int) -> str:
    """The implementation for a platform ("cpu", "gpu", "tpu") and a number of groups, logged once for each."""
    implementation = {"cpu": "blocked", "tpu": "megablox"}.get(platform, "ragged")
    if platform == "tpu" and groups == 1:
        implementation = "ragged"  # what a mask leaves of one group is all of it
    _logger.info("grouped_matmul of %d groups on %s runs as %r", groups, platform, implementation)
    return implementation


def _check(lhs, rhs, group_sizes, transpose_rhs):
    wanted = "[e n k]" if transpose_rhs else "[e k n..]"
    fits = rhs.ndim == 3 if transpose_rhs else rhs.ndim >= 3
    if lhs.ndim != 2 or not fits or lhs.shape[1] != rhs.shape[2 if transpose_rhs else 1]:
        raise ValueError(
            f"grouped_matmul wants lhs [m k] and rhs {wanted}; got lhs {list(lhs.shape)} and rhs {list(rhs.shape)}; "
            "flatten tokens to rows, and check that k agrees"
        )
    if group_sizes.shape != rhs.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes must be integers [e={rhs.shape[0]}], one for each matrix of rhs; got "
            f"{group_sizes.dtype}{list(group_sizes.shape)}; count rows with zeros(e, int32).at[experts].add(1)"
        )
    dtypes = {lhs.dtype, rhs.dtype}
    if len(dtypes) != 1 or not jnp.issubdtype(lhs.dtype, jnp.floating):
        raise ValueError(f"lhs and rhs must share a floating dtype; got {lhs.dtype} and {rhs.dtype}; cast one of them")
