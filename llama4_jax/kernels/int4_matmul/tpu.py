"""Products with few-bit weights on TPUs: Pallas kernels that read int4 and int8 values as they lie, never written as floats.

A step of the grid makes a block of the output from all of its inputs. Matrix units multiply rows with the small integers
themselves, which are exact in bfloat16, and what comes out of each group of inputs is multiplied by the group's scale: one
multiplication for each row and group instead of one for each weight. Rows that are rounded to int8 meet the weights in int8
matrix units, where the chip has them, with the same result up to the rounding of float32 sums. Groups shorter than a matrix
unit is deep are dequantised block by block instead. Offsets act through the sums of each row over each group.

What has been shown, and what not: in the interpreter the kernels equal the reference, and its race detector finds nothing;
they compile for v5e, v5p, v6e and tpu7x. They have never run on a chip.

Source: W4A16 with scales after each group's product, as in Frantar et al., "MARLIN" (2024); grouped: MegaBlocks (Gale et al. 2022).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.int4_matmul import blocks, steps
from llama4_jax.kernels.int4_matmul.operands import DEPTH, SPAN, Operands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """How a kernel is made: rows and columns of a block of the output, and which axes of the grid cores may divide."""

    rows: int
    columns: int
    semantics: tuple[str, str]


def matmul(x: jax.Array, weight: QuantizedArray, *, dtype=None, over=(), columns: int | None = None) -> jax.Array:
    """`x [m k] @ weight [k n..]`; see `api.matmul`. columns: of a block, instead of the table's.

    Raises NotImplementedError for what `operands.refusal` names.
    """
    operands = Operands.make(x, weight, leading=0, int8=blocks.has_int8(), over=over)
    block = blocks.choose(operands, columns)
    kernel = Kernel(rows=block.rows, columns=block.columns, semantics=("parallel", "parallel"))
    return multiply(kernel, operands, dtype or x.dtype).reshape(-1, *weight.shape[1:])


def grouped(
    x: jax.Array, weight: QuantizedArray, group_sizes: jax.Array, *, dtype=None, over=(), columns: int | None = None
) -> jax.Array:
    """Each row of x [m k] times its group's matrix of weight [e k n..]; see `api.grouped` and `matmul`."""
    weight = dataclasses.replace(weight, values=_in_hbm(weight.values))
    operands = Operands.make(x, weight, leading=1, int8=blocks.has_int8(), over=over)
    block = blocks.choose(operands, columns)
    kernel = Kernel(rows=block.rows, columns=block.columns, semantics=("parallel", "arbitrary"))
    return multiply_grouped(kernel, operands, group_sizes, dtype or x.dtype).reshape(-1, *weight.shape[2:])


@partial(jax.jit, inline=True)  # cannot be called but in a traced function
def _in_hbm(values: jax.Array) -> jax.Array:
    """Left in the chip's large memory: the compiler would fetch all matrices ahead into the fast one, visited or not."""
    return pltpu.with_memory_space_constraint(values, pltpu.HBM)


def multiply(kernel: Kernel, operands: Operands, dtype) -> jax.Array:
    """The product of all rows with the only matrix, [m n]."""
    rows, columns = operands.shape
    return pl.pallas_call(
        partial(_matmul_kernel, operands.group),
        grid=(pl.cdiv(rows, kernel.rows), pl.cdiv(columns, kernel.columns)),
        in_specs=[operands.specs(kernel, lambda i, j: (i, 0, j))],
        out_specs=pl.BlockSpec((kernel.rows, kernel.columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=_parameters(kernel, operands),
        cost_estimate=operands.cost(dtype),
        name="int4_matmul",
    )(operands.arrays)


def multiply_grouped(kernel: Kernel, operands: Operands, group_sizes: jax.Array, dtype) -> jax.Array:
    """The product of each row with its group's matrix, [m n]; zero for rows of no group."""
    rows, columns = operands.shape
    plan = steps.plan(group_sizes, rows, kernel.rows)
    num_steps = plan.block.shape[0]
    return pl.pallas_call(
        partial(_grouped_kernel, operands.group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(pl.cdiv(columns, kernel.columns), num_steps),
            in_specs=[operands.specs(kernel, lambda j, step, matrix, block, *_: (block[step], matrix[step], j))],
            out_specs=pl.BlockSpec((kernel.rows, kernel.columns), lambda j, step, matrix, block, *_: (block[step], j)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=_parameters(kernel, operands),
        cost_estimate=operands.cost(dtype),
        name="int4_grouped",
    )(*plan, operands.arrays)


def _matmul_kernel(group: int, refs: dict, out) -> None:
    out[...] = _product(group, refs).astype(out.dtype)


def _grouped_kernel(group: int, matrix, block, start, end, owned, refs: dict, out) -> None:
    step = pl.program_id(1)
    first, last = start[step], end[step]
    row = block[step] * out.shape[0] + lax.broadcasted_iota(jnp.int32, (out.shape[0], 1), 0)
    mine = (row >= first) & (row < last)

    def store(product):  # other rows of the block are other steps', before and after this one
        out[...] = jnp.where(mine, product, out[...].astype(jnp.float32)).astype(out.dtype)

    some = last > first
    pl.when(some & (owned[step] == 1))(lambda: store(_product(group, refs)))
    pl.when(some & (owned[step] == 0))(lambda: store(jnp.zeros(out.shape, jnp.float32)))


def _product(group: int, refs: dict) -> jax.Array:
    """A block of the output, float32 [rows columns], of refs as `Operands.arrays` has them."""
    scales = refs["scales"][...].astype(jnp.float32)  # [groups columns]
    product = _after(group, refs, scales) if group >= DEPTH or len(scales) == 1 else _before(group, refs, scales)
    if "row_scales" in refs:
        product *= refs["row_scales"][...]
    return product


def _after(group: int, refs: dict, scales: jax.Array) -> jax.Array:
    """Scales are applied to each group's product."""
    rows, values = refs["rows"], refs["values"]
    total = None
    for index in range(len(scales)):
        parts = []
        for start in range(index * group, (index + 1) * group, SPAN):
            span = slice(start, min(start + SPAN, (index + 1) * group))
            parts.append(_dot(rows[:, span], values[span, :]))
        scaled = sum(parts[1:], parts[0]).astype(jnp.float32) * scales[index : index + 1]
        total = scaled if total is None else total + scaled
    if "offsets" in refs:
        shifts = refs["offsets"][...].astype(jnp.float32) * scales
        total -= jnp.dot(refs["sums"][...], shifts, precision=lax.Precision.HIGHEST)
    return total


def _before(group: int, refs: dict, scales: jax.Array) -> jax.Array:
    """Scales are applied to the weights of a few groups at a time."""
    rows, values = refs["rows"], refs["values"]
    total = jnp.zeros((rows.shape[0], values.shape[1]), jnp.float32)
    for start in range(0, values.shape[0], DEPTH):
        span = slice(start, min(start + DEPTH, values.shape[0]))
        of_span = slice(start // group, span.stop // group)
        weights = values[span, :].astype(jnp.float32)
        if "offsets" in refs:
            weights -= jnp.repeat(refs["offsets"][of_span, :].astype(jnp.float32), group, axis=0)
        weights *= jnp.repeat(scales[of_span], group, axis=0)
        total += _dot(rows[:, span], weights.astype(rows.dtype))
    return total


def _dot(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """[m k] times [k n], summed in int32 or float32."""
    if rows.dtype == jnp.int8:
        return jnp.dot(rows, weights.astype(jnp.int8), preferred_element_type=jnp.int32)
    if rows.dtype == jnp.float32:
        return jnp.dot(rows, weights.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if not jnp.issubdtype(weights.dtype, jnp.integer):
        weights = weights.astype(rows.dtype)
    # Integers are left for the compiler to convert on their way to the matrix units: the v5e's takes 7 % less time so.
    return lax.dot_general(rows, weights, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _parameters(kernel: Kernel, operands: Operands) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=kernel.semantics, vmem_limit_bytes=blocks.vmem(operands, kernel.rows, kernel.columns)
    )
