"""The grouped product on TPUs: XLA's kernel, and for d rhs, which XLA makes of masks, the one of JAX's Megablox.

`jax.lax.ragged_dot` becomes a kernel whose cost follows the rows, and so does its gradient in lhs. In rhs it becomes one product
of all rows for each group, of which a mask leaves that group's: groups-times the arithmetic, and groups copies of the rows. Of
rows that fill no tile `ragged_dot` becomes such products as well, which read the matrices of all groups, empty ones too.

Source: jax.experimental.pallas.ops.tpu.megablox, `tgmm`; MegaBlocks (Gale et al. 2022), section 5.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

from llama4_jax.core import partitioning
from llama4_jax.kernels.grouped_matmul import ragged

TILE = 8  # rows that the kernel takes a whole number of
ROWS = (512, 256, 128)  # of a tile: the largest that divides the rows, which are filled up for the smallest
WIDTH = 2048  # bytes of a row of any tile: with the float32 sum they fit the fast memory of every generation


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=False):
    """Grouped product for TPUs, in Pallas' interpreter on a CPU; see `api.grouped_matmul`.

    Raises NotImplementedError for dtypes that the kernel does not know.
    """
    if lhs.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"megablox multiplies bfloat16 and float32, got {lhs.dtype}; cast to one of them, or use 'ragged'"
        )
    return _product(lhs, rhs, group_sizes, transpose_rhs)


def _product(lhs, rhs, group_sizes, transpose_rhs):
    rows = lhs.shape[0]
    lhs = jnp.pad(lhs, ((0, -rows % TILE), (0, 0)))  # they belong to no group
    return ragged.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs)[:rows]


def _forward(lhs, rhs, group_sizes, transpose_rhs):
    return grouped_matmul(lhs, rhs, group_sizes, transpose_rhs), (lhs, rhs, group_sizes)


def _backward(transpose_rhs, saved, cotangent):
    lhs, rhs, group_sizes = saved
    with jax.named_scope("grouped_matmul_d_lhs"):
        _, pull = jax.vjp(lambda lhs: _product(lhs, rhs, group_sizes, transpose_rhs), lhs)
        (d_lhs,) = pull(cotangent)
    with jax.named_scope("grouped_matmul_d_rhs"):
        cotangent = cotangent.reshape(lhs.shape[0], -1)
        outer = (cotangent, lhs) if transpose_rhs else (lhs, cotangent)
        d_rhs = _outer_products(*outer, group_sizes)
    return d_lhs, d_rhs.reshape(rhs.shape), None


grouped_matmul.defvjp(_forward, _backward)


def _outer_products(left, right, group_sizes):
    """`left[group].T @ right[group]` for each group, of left [m a] and right [m b]: `[e a b]`, summed in float32."""
    filling = -left.shape[0] % ROWS[-1]
    left, right = (jnp.pad(rows, ((0, filling), (0, 0))) for rows in (left, right))  # as in `_product`
    tile = next(rows for rows in ROWS if left.shape[0] % rows == 0)
    tiling = tile, *(min(WIDTH // rows.dtype.itemsize, rows.shape[1]) for rows in (left, right))
    interpret = partitioning.platform() == "cpu"
    # Transposed there and back: what the kernel reads is `left` as it lies.
    return tgmm(left.T, right, group_sizes.astype(jnp.int32), left.dtype, tiling, interpret=interpret)
