"""Rows times the transposes of matrices, for decoding on a CPU: a few rows, and time goes into reading the weights.
(Attention's values alone are not transposed: `each_plain`.)

`native` is used for at most `FEW_ROWS` rows on a CPU that has a compiler. XLA's products, which do all other sizes and platforms,
copy an expert's matrix out of its stack first and convert one of bfloat16 or of few bits, which takes longer than the product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.core import partitioning, quantized
from llama4_jax.kernels.few_rows import native
from llama4_jax.kernels.few_rows.packed import Packed
from llama4_jax.kernels.grouped_matmul import grouped_matmul
from llama4_jax.kernels.int4_matmul import rounded

FEW_ROWS = 16


def multiply(rows: jax.Array, matrix: jax.Array | Packed, activations: str | None = None) -> jax.Array:
    """`rows [m k]` times the transpose of `matrix [n k]`: [m n], summed and returned in float32 at least.

    activations: what rows are rounded to first, see `config.quant.QuantSpec`.
    """
    if _is_native(rows, matrix, rows.shape[0]):
        return _native(rows, matrix[None], jnp.full(1, rows.shape[0], jnp.int32), activations)
    if isinstance(matrix, Packed):
        rows, matrix = rows.astype(jnp.float32), matrix.unpack()
    return _product(_rounded(rows, activations), matrix)


def grouped(
    rows: jax.Array, matrices: jax.Array | Packed, group_sizes: jax.Array, activations: str | None = None
) -> jax.Array:
    """Each row of [m k], sorted by group, times the transpose of its group's matrix of [e n k]: [m n] in rows' dtype.

    group_sizes: [e] int32, the rows of each group; rows past their sum give 0. activations: as in `multiply`.
    """
    if _is_native(rows, matrices, rows.shape[0]):
        return _native(rows, matrices, group_sizes, activations).astype(rows.dtype)
    if isinstance(matrices, Packed):
        matrices = matrices.unpack().astype(rows.dtype)
    return grouped_matmul(_rounded(rows, activations), matrices, group_sizes, transpose_rhs=True)


def each(rows: jax.Array, matrices: jax.Array) -> jax.Array | None:
    """`rows [e m k]` times the transposes of `matrices [e n k]`, each its own: [e m n] in float32; None where XLA must do it."""
    groups, m, k = rows.shape
    if not _is_native(rows, matrices, m):
        return None
    out = _native(rows.reshape(-1, k), matrices, jnp.full(groups, m, jnp.int32), None)
    return out.reshape(groups, m, -1)


def each_plain(rows: jax.Array, matrices: jax.Array) -> jax.Array | None:
    """`rows [e m k]` times `matrices [e k n]`, each its own, in float32: [e m n]; None where XLA must do it."""
    known = rows.dtype == jnp.float32 and matrices.dtype in native.PLAIN
    return _plain(rows, matrices) if known and _is_place(rows.shape[1]) else None


@jax.custom_vjp
def _plain(rows, matrices):
    groups, m, k = rows.shape
    return native.plain(rows.reshape(-1, k), matrices, jnp.full(groups, m, jnp.int32)).reshape(groups, m, -1)


def _plain_product(rows, matrices):
    return jnp.einsum("emk,ekn->emn", rows, matrices.astype(rows.dtype))


_plain.defvjp(
    lambda rows, matrices: (_plain(rows, matrices), (rows, matrices)),
    lambda saved, cotangent: jax.vjp(_plain_product, *saved)[1](cotangent),
)


def _is_native(rows: jax.Array, matrices: jax.Array | Packed, few: int) -> bool:
    floats = not isinstance(matrices, Packed)
    known = (
        rows.dtype == matrices.dtype and rows.dtype in native.HANDLERS if floats else matrices.kind in native.LOW_BIT
    )
    return known and _is_place(few)


def _is_place(few: int) -> bool:
    """Whether this is the place for products of `few` rows."""
    # A mesh divides products, and cannot divide what it does not know.
    at_hand = partitioning.platform() == "cpu" and not partitioning.mesh_in_use()
    return 0 < few <= FEW_ROWS and at_hand and native.available()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _native(rows, matrices, group_sizes, activations):
    if not isinstance(matrices, Packed):
        return native.grouped(_rounded(rows, activations), matrices, group_sizes)
    if activations == "int8" and (matrices.kind, "int8") in native.LOW_BIT_ROWS:
        values, scales = quantized.quantize_rows(rows, "int8")
        out = native.low_bit_rows(matrices.filled(values), scales[:, 0], matrices, group_sizes)
        rows = values.astype(jnp.float32) * scales
    else:
        rows = _rounded(rows.astype(jnp.float32), activations)
        out = native.low_bit(matrices.filled(rows), matrices, group_sizes)
    return out if matrices.offsets is None else out - _shifted(rows, matrices, group_sizes)


def _shifted(rows: jax.Array, matrices: Packed, group_sizes: jax.Array) -> jax.Array:
    """What the offsets of weights take off: each group's inputs added up, times its offset in the output's scale."""
    sums = jnp.sum(rows.reshape(*rows.shape[:1], matrices.scales.shape[-1], -1), axis=-1)  # [m groups]
    return native.grouped(sums, matrices.offsets * matrices.scales, group_sizes)


def _forward(rows, matrices, group_sizes, activations):
    return _native(rows, matrices, group_sizes, activations), (rows, matrices, group_sizes)


def _backward(activations, saved, cotangent):
    """Rounding of rows passes the gradient on; weights of few bits are constants."""
    rows, matrices, group_sizes = saved
    product = functools.partial(grouped_matmul, group_sizes=group_sizes, transpose_rhs=True)
    cotangent = cotangent.astype(rows.dtype)
    if isinstance(matrices, Packed):
        weights = matrices.unpack().astype(rows.dtype)
        return *jax.vjp(lambda rows: product(rows, weights), rows)[1](cotangent), None, None
    return *jax.vjp(product, _rounded(rows, activations), matrices)[1](cotangent), None


_native.defvjp(_forward, _backward)


def _rounded(rows: jax.Array, activations: str | None) -> jax.Array:
    return rows if activations is None else rounded(rows, activations)


def _product(rows, matrix):
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    if rows.shape[0] == 1 and rows.dtype == jnp.bfloat16:  # XLA would convert the whole matrix for a single such row
        return _product(jnp.concatenate([rows, rows]), matrix)[:1]
    return lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=wide)
