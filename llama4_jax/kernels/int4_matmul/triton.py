"""Products with few-bit weights on GPUs: Pallas kernels that Triton compiles, which read int4 two values a byte.

A byte of XLA's int4 arrays holds the weights of two neighbouring outputs, so that unpacked it is two blocks, of even and of odd
outputs; they are multiplied apart and put side by side at the end, in the small result. Tensor cores multiply rows with the
integers themselves, and each group's product is multiplied by its scale. Of many matrices, a step multiplies the rows that one
of them has in a block, and writes these alone, so that the order of steps is nobody's concern.

What has been shown, and what not: in Pallas' interpreter they equal the reference, and they compile for H100 and B200
(`experiments/gpu_few_bits.py`). No GPU has run them: they are not a default.

Source: as `tpu`. Limits: groups and inputs in parts of at least 16, a power of two.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.int4_matmul import steps
from llama4_jax.kernels.int4_matmul.operands import Operands

ROWS, COLUMNS, DEPTH = 64, 64, 128  # of a block, at most; columns in each half
SMALLEST = 16  # side of a matrix that tensor cores multiply


def matmul(x: jax.Array, weight: QuantizedArray, *, dtype=None, over=(), interpret: bool = False) -> jax.Array:
    """`x [m k] @ weight [k n..]`; see `api.matmul`. interpret: in Pallas' interpreter, where there is no GPU.

    Raises NotImplementedError for the limits above and those of `operands.refusal`.
    """
    operands = Operands.make(x, weight, leading=0, int8=False, over=over)
    product = _multiply(operands, None, interpret)
    return product.astype(dtype or x.dtype).reshape(-1, *weight.shape[1:])


def grouped(
    x: jax.Array, weight: QuantizedArray, group_sizes: jax.Array, *, dtype=None, over=(), interpret: bool = False
) -> jax.Array:
    """Each row of x [m k] times its group's matrix of weight [e k n..]; see `api.grouped` and `matmul`."""
    operands = Operands.make(x, weight, leading=1, int8=False, over=over)
    product = _multiply(operands, group_sizes, interpret)
    return product.astype(dtype or x.dtype).reshape(-1, *weight.shape[2:])


def _multiply(operands: Operands, group_sizes: jax.Array | None, interpret: bool) -> jax.Array:
    """The product of all rows, each with its group's matrix or with the only one: [m n] float32."""
    arrays, depth = operands.arrays, math.gcd(operands.group, DEPTH)
    if depth < SMALLEST:
        raise NotImplementedError(
            f"Triton's kernel does not do groups of {operands.group} inputs, only multiples of 16; use 'xla'"
        )
    rows, outputs = operands.shape
    block = min(ROWS, max(SMALLEST, pl.next_power_of_2(rows)))
    filled = jnp.pad(arrays["rows"], ((0, -rows % block), (0, 0)))
    weight = {name: _whole_blocks(arrays[name]) for name in ("values", "scales", "offsets") if name in arrays}
    columns = weight["scales"].shape[2] // 2
    plan = () if group_sizes is None else steps.plan(group_sizes, rows, block)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    def of_columns(array):
        *leading, width = array.shape
        return pl.BlockSpec((*leading, width // columns * COLUMNS), lambda i, j: (*[0] * len(leading), j))

    half = jax.ShapeDtypeStruct((len(filled), columns), jnp.float32)
    products = pl.pallas_call(
        functools.partial(_grouped_kernel if plan else _kernel, operands.group, depth, block),
        grid=(len(plan.block) if plan else len(filled) // block, columns // COLUMNS),
        in_specs=[
            *(pl.BlockSpec((None,), lambda i, j: (i,)) for _ in plan),
            whole(filled),
            {name: of_columns(array) for name, array in weight.items()},
        ],
        out_specs=(of_columns(half),) * 2,
        out_shape=(half,) * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name="int4_grouped" if plan else "int4_matmul",
        interpret=interpret,
    )(*plan, filled, weight)
    product = jnp.stack(products, axis=2).reshape(len(filled), -1)[:rows, :outputs]
    return product * arrays["row_scales"] if "row_scales" in arrays else product


def _whole_blocks(array: jax.Array) -> jax.Array:
    """[e k n], of int4 as bytes [e k n/2]; n is filled up to whole blocks."""
    array = jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % (2 * COLUMNS))))
    if array.dtype != jnp.int4:
        return array
    return lax.bitcast_convert_type(array.reshape(*array.shape[:2], -1, 2), jnp.int8)


def _kernel(group: int, depth: int, block: int, rows, refs: dict, *out) -> None:
    """A block of rows: rows [m k]; refs as `_whole_blocks` has them; out [m columns], even and odd."""
    own = pl.ds(pl.program_id(0) * block, block)
    only = jnp.zeros((), jnp.int32)
    for half, product in zip(out, _product(group, depth, rows, own, refs, only)):
        half[own, :] = product


def _grouped_kernel(
    group: int, depth: int, block: int, matrix, of_rows, start, end, owned, rows, refs: dict, *out
) -> None:
    """The rows of one group in a block. Refs besides those of `_kernel`: the numbers of a `steps.Steps`, each []."""
    first, last = start[...], end[...]
    own = pl.ds(of_rows[...] * block, block)
    row = of_rows[...] * block + jnp.arange(block)
    mine = jnp.broadcast_to(((row >= first) & (row < last))[:, None], (block, COLUMNS))

    def store(products):  # other rows of the block are other steps'
        for half, product in zip(out, products):
            plgpu.store(half.at[own, :], product, mask=mine)

    some = last > first
    pl.when(some & (owned[...] == 1))(lambda: store(_product(group, depth, rows, own, refs, matrix[...])))
    pl.when(some & (owned[...] == 0))(lambda: store((jnp.zeros(mine.shape, jnp.float32),) * 2))


def _product(group: int, depth: int, rows, own, refs: dict, matrix) -> tuple[jax.Array, jax.Array]:
    """`own` rows times the even and the odd outputs of a matrix, each [block columns] float32."""
    halves = [pl.ds(half, COLUMNS, stride=2) for half in range(2)]
    packed = refs["values"].shape[2] < refs["scales"].shape[2]

    def step(index, totals):
        inputs, of_group = pl.ds(index * depth, depth), lax.div(index * depth, group)
        x = rows[own, inputs]
        integers = _unpacked(refs["values"][matrix, inputs, :]) if packed else None
        results = []
        for number, (half, total) in enumerate(zip(halves, totals)):
            weights = integers[number] if packed else refs["values"][matrix, inputs, half]
            weights = weights.astype(jnp.float32)
            if "offsets" in refs:
                weights -= refs["offsets"][matrix, of_group, half].astype(jnp.float32)[None, :]
            # Exact in bfloat16: integers of at most 8 bits, and their offsets.
            part = plgpu.dot(x, weights.astype(x.dtype), allow_tf32=False)
            results.append(total + part * refs["scales"][matrix, of_group, half].astype(jnp.float32)[None, :])
        return tuple(results)

    start = (jnp.zeros((own.size, COLUMNS), jnp.float32),) * 2
    return lax.fori_loop(0, rows.shape[1] // depth, step, start)


def _unpacked(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high four bits of int8, with their signs."""
    wide = packed.astype(jnp.int32)
    return lax.shift_right_arithmetic(wide << 28, 28), lax.shift_right_arithmetic(wide, 4)
