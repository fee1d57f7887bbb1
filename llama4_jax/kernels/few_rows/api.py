"""Rows times the transposes of matrices, for decoding on a CPU: a few rows, and time goes into reading the weights.

`native` is used for at most `FEW_ROWS` rows on a CPU that has a compiler. XLA's products, which do all other sizes and platforms,
copy an expert's matrix out of its stack first and convert a bfloat16 one, which takes longer than the product does.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.core import partitioning
from llama4_jax.kernels.few_rows import native
from llama4_jax.kernels.grouped_matmul import grouped_matmul

FEW_ROWS = 16


def multiply(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """`rows [m k]` times the transpose of `matrix [n k]`: [m n], summed and returned in float32 at least."""
    if _is_native(rows, matrix):
        return _native(rows, matrix[None], jnp.full(1, rows.shape[0], jnp.int32))
    return _product(rows, matrix)


def grouped(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Each row of [m k], sorted by group, times the transpose of its group's matrix of [e n k]: [m n] in rows' dtype.

    group_sizes: [e] int32, the rows of each group; rows past their sum give 0.
    """
    if _is_native(rows, matrices):
        return _native(rows, matrices, group_sizes).astype(rows.dtype)
    return grouped_matmul(rows, matrices, group_sizes, transpose_rhs=True)


def _is_native(rows: jax.Array, matrices: jax.Array) -> bool:
    few = 0 < rows.shape[0] <= FEW_ROWS and rows.dtype == matrices.dtype and matrices.dtype in native.HANDLERS
    # A mesh divides products, and cannot divide what it does not know.
    return few and partitioning.platform() == "cpu" and partitioning.mesh_in_use() is None and native.available()


@jax.custom_vjp
def _native(rows, matrices, group_sizes):
    return native.grouped(rows, matrices, group_sizes)


def _forward(rows, matrices, group_sizes):
    return native.grouped(rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(saved, cotangent):
    rows, matrices, group_sizes = saved
    product = functools.partial(grouped_matmul, group_sizes=group_sizes, transpose_rhs=True)
    return *jax.vjp(product, rows, matrices)[1](cotangent.astype(rows.dtype)), None


_native.defvjp(_forward, _backward)


def _product(rows, matrix):
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    if rows.shape[0] == 1 and rows.dtype == jnp.bfloat16:  # XLA would convert the whole matrix for a single such row
        return _product(jnp.concatenate([rows, rows]), matrix)[:1]
    return lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=wide)
