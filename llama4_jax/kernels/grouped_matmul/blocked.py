"""Grouped matrix product as blocks of sorted rows: cost follows the rows, not the number of groups.

On the CPU `lax.ragged_dot` multiplies every row with every group's matrix. Here a loop visits the groups that have rows
and inner loops cut each group's rows into blocks of falling size (`ROW_BLOCKS`), so that at most the last few rows are
padding. Group sizes are data: every loop has a dynamic trip count, every shape is static, and nothing is dropped.

The gradients are the same walk over the groups: d lhs multiplies each block with the matrix read the other way round
(no transposed copy is made), and d rhs adds up lhs_block^T d out_block of one group at a time.

Why it looks as it does, on XLA's CPU backend:
* A matrix sliced out of `[e k n]` is copied. It is sliced once a group, outside the loops over that group's blocks.
  (Decoding, which feels even that, has its own way: `kernels.few_rows`.)
* Slicing or updating a bfloat16 array converts *all of it* to float32, and the conversion is hoisted out of the loop.
  Tying the array to the loop's index keeps the conversion inside, where it melts into the slice; what is updated in
  a loop is carried as integers.
* A bfloat16 product that contracts both operands' rows runs in float32, so lhs is transposed once before the loop.
* A product that returns bfloat16 runs several times slower than one that returns float32 and is rounded afterwards, and
  one with a single bfloat16 row converts its matrix first: such a row is doubled.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

ROW_BLOCKS = (128, 32, 16, 4, 1)
"""Rows to a block for the output and d lhs. Blocks of 128 rows run at the machine's best rate, of 32 at 0.9 of it; the
shortest serve decoding, where reading the matrix is what takes the time."""

REDUCTION_BLOCKS = (1024, 256, 128, 64, 16)
"""Rows to a block for d rhs: they are what is summed over, and each block costs one more pass over the sum."""

PADDING = 0.5
"""Blocks shorter than this share of the mean group are not used: they would be many, each reading a whole matrix."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=False):
    """Grouped product for XLA's CPU backend; see `api.grouped_matmul`."""
    if transpose_rhs:
        return _products(lhs, rhs, group_sizes, contract=1)
    # The reshape is in here, so that what a scan over layers keeps for the gradient is rhs and not a second copy of it.
    out = _products(lhs, rhs.reshape(*rhs.shape[:2], -1), group_sizes, contract=0)
    return out.reshape(-1, *rhs.shape[2:])


def _forward(lhs, rhs, group_sizes, transpose_rhs):
    return grouped_matmul(lhs, rhs, group_sizes, transpose_rhs), (lhs, rhs, group_sizes)


def _backward(transpose_rhs, saved, cotangent):
    lhs, rhs, group_sizes = saved
    cotangent, matrices = cotangent.reshape(lhs.shape[0], -1), rhs.reshape(*rhs.shape[:2], -1)
    with jax.named_scope("grouped_matmul_d_lhs"):
        d_lhs = _products(cotangent, matrices, group_sizes, contract=0 if transpose_rhs else 1)
    with jax.named_scope("grouped_matmul_d_rhs"):
        outer = (cotangent, lhs) if transpose_rhs else (lhs, cotangent)
        d_rhs = _outer_products(*outer, group_sizes)
    return d_lhs, d_rhs.reshape(rhs.shape), None


grouped_matmul.defvjp(_forward, _backward)


def _products(rows, matrices, group_sizes, *, contract: int):
    """`rows [m a]` times each group's matrix, contracting the matrix's axis `contract`: `[m b]`, 0 past the groups."""
    width = matrices.shape[-1 if contract == 0 else -2]
    sizes = _block_sizes(ROW_BLOCKS, rows.shape[0], group_sizes.shape[0])

    def group(matrix, start, stop, out):
        def block(size, begin, out):
            left = _slice(rows, begin, size)  # [size a]
            product = _carried(_dot(left, matrix, ((1,), (contract,))).astype(rows.dtype))  # [size b]
            if size == sizes[-1]:  # the only size that reaches past the group's end, and past the array's
                kept = lax.dynamic_slice_in_dim(out, begin, size)
                product = jnp.where(_inside(begin, size, stop, rows.shape[0]), product, kept)
            return lax.dynamic_update_slice_in_dim(out, product, begin, 0)

        return _over_blocks(sizes, start, stop, block, out)

    def visit(expert, start, stop, out):
        return group(_slice(matrices, expert, 1)[0], start, stop, out)

    zeros = _carried(jnp.zeros((rows.shape[0], width), rows.dtype))
    return _restored(_over_groups(group_sizes, visit, zeros), rows.dtype)


def _outer_products(left, right, group_sizes):
    """`left_group^T right_group` of each group: `[e a b]` of `[m a]` and `[m b]`, 0 where a group is empty.

    Summed in float32.
    """
    rows, shape = left.shape[0], (left.shape[1], right.shape[1])
    sizes = _block_sizes(REDUCTION_BLOCKS, rows, group_sizes.shape[0])
    columns = left.T  # [a m]

    def visit(expert, start, stop, out):
        def block(size, begin, total):
            some, others = _slice(columns, begin, size, axis=1), _slice(right, begin, size)  # [a size], [size b]
            if size == sizes[-1]:
                inside = _inside(begin, size, stop, rows)
                some, others = jnp.where(inside.T, some, 0), jnp.where(inside, others, 0)  # both: 0 * inf is not 0
            return total + _dot(some, others, ((1,), (0,)))

        total = _over_blocks(sizes, start, stop, block, jnp.zeros(shape, _accumulator(left.dtype)))
        return lax.dynamic_update_index_in_dim(out, _carried(total.astype(left.dtype)), expert, 0)

    zeros = _carried(jnp.zeros((group_sizes.shape[0], *shape), left.dtype))
    return _restored(_over_groups(group_sizes, visit, zeros), left.dtype)


def _over_groups(group_sizes, visit, carry):
    """`carry = visit(expert, start, stop, carry)` for each group that has rows, in the order of the rows."""
    ends = jnp.cumsum(group_sizes)
    occupied = group_sizes > 0
    experts = jnp.argsort(~occupied, stable=True)  # those that have rows first, otherwise in order

    def step(i, carry):
        expert = experts[i]
        return visit(expert, ends[expert] - group_sizes[expert], ends[expert], carry)

    return lax.fori_loop(0, jnp.sum(occupied), step, carry)


def _over_blocks(sizes, start, stop, block, carry):
    """`carry = block(size, begin, carry)` over rows start..stop: as many blocks of each size in turn as fit.

    Only blocks of the last size may reach past `stop`.
    """

    def run(size, first, count, carry):
        return lax.fori_loop(0, count, lambda i, carry: block(size, first + i * size, carry), carry)

    begin = start
    for size in sizes:
        rest = stop - begin
        count = lax.div(rest + (size - 1 if size == sizes[-1] else 0), size)
        carry = run(size, begin, count, carry)
        begin = begin + count * size
    return carry


def _block_sizes(preferred: tuple[int, ...], rows: int, groups: int) -> tuple[int, ...]:
    """The sizes worth using, largest first: none longer than the array (a slice may not be), none too short to pay."""
    shortest = max(size for size in preferred if size <= max(PADDING * rows / groups, preferred[-1]))
    return tuple(size for size in preferred if shortest <= size <= rows) or (min(rows, shortest),)


def _inside(begin, size: int, stop, rows: int):
    """bool `[size 1]`: which rows are in begin..stop, of the block at `begin` or, where that passes the end, before."""
    row = jnp.minimum(begin, rows - size) + jnp.arange(size)
    return ((row >= begin) & (row < stop))[:, None]


def _slice(array, begin, size: int, axis: int = 0):
    """The slice begin..begin + size, moved back where it would pass the end; see the file's head for the barrier."""
    array, begin = lax.optimization_barrier((array, begin))
    return lax.dynamic_slice_in_dim(array, begin, size, axis)


def _dot(left, right, contract):
    """Product with sums in float32 at least, and returned so."""
    if left.shape[0] == 1 and left.dtype == jnp.bfloat16:
        return _dot(jnp.concatenate([left, left]), right, contract)[:1]
    return lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=_accumulator(left.dtype))


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _carried(array):
    """The array as a loop should carry it to update it in place: 16-bit floats as integers."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype.itemsize == 2 else array


def _restored(array, dtype):
    """The array of `dtype` from what `_carried` made of it."""
    return lax.bitcast_convert_type(array, dtype) if array.dtype != dtype else array
