"""Products with few-bit weights on GPUs: a Pallas kernel that Triton compiles, which reads int4 two values a byte.

A byte of XLA's int4 arrays holds the weights of two neighbouring outputs, so that unpacked it is two blocks, of even and of odd
outputs; they are multiplied apart and put side by side at the end, in the small result. Tensor cores multiply rows with the
integers themselves, and each group's product is multiplied by its scale.

What has been shown, and what not: in Pallas' interpreter it equals the reference, and JAX lowers it to Triton. No GPU's
compiler has seen it and no GPU has run it: it is not a default.

Source: as `tpu`. Limits: groups and inputs in parts of at least 16, a power of two; products with one matrix alone.
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
from llama4_jax.kernels.int4_matmul.operands import Operands

ROWS, COLUMNS, DEPTH = 64, 64, 128  # of a block, at most; columns in each half
SMALLEST = 16  # side of a matrix that tensor cores multiply


def matmul(x: jax.Array, weight: QuantizedArray, *, dtype=None, over=(), interpret: bool = False) -> jax.Array:
    """`x [m k] @ weight [k n..]`; see `api.matmul`. interpret: in Pallas' interpreter, where there is no GPU.

    Raises NotImplementedError for the limits above and those of `operands.refusal`.
    """
    operands = Operands.make(x, weight, leading=0, int8=False, over=over)
    arrays, group = operands.arrays, operands.group
    depth = math.gcd(group, DEPTH)
    if depth < SMALLEST:
        raise NotImplementedError(
            f"Triton's kernel does not do groups of {group} inputs, only multiples of 16; use 'xla'"
        )
    rows, outputs = operands.shape
    block = min(ROWS, max(SMALLEST, pl.next_power_of_2(rows)))
    filled = jnp.pad(arrays["rows"], ((0, -rows % block), (0, 0)))
    halves = {name: _halves(arrays[name], COLUMNS) for name in ("values", "scales", "offsets") if name in arrays}
    product = _multiply(filled, halves, group, depth, block, interpret)  # [halves m columns]
    product = jnp.moveaxis(product, 0, 2).reshape(len(filled), -1)[:rows, :outputs]
    product = product * arrays["row_scales"] if "row_scales" in arrays else product
    return product.astype(dtype or x.dtype).reshape(-1, *weight.shape[1:])


def grouped(x: jax.Array, weight: QuantizedArray, group_sizes: jax.Array, *, dtype=None, over=()) -> jax.Array:
    """Not there: raises NotImplementedError."""
    del x, group_sizes, dtype, over
    raise NotImplementedError(f"Triton's kernel does not do {weight.shape[0]} matrices; use 'xla'")


def _halves(array: jax.Array, columns: int) -> jax.Array:
    """[1 k n] as even and odd outputs: [k n/2] bytes for int4, else [2 k n/2]; n is filled up to whole blocks."""
    array = jnp.pad(array[0], ((0, 0), (0, -array.shape[2] % (2 * columns))))
    pairs = array.reshape(len(array), -1, 2)
    if array.dtype == jnp.int4:
        return lax.bitcast_convert_type(pairs, jnp.int8)
    return jnp.moveaxis(pairs, 2, 0)


def _multiply(rows: jax.Array, halves: dict, group: int, depth: int, block: int, interpret: bool) -> jax.Array:
    columns = halves["scales"].shape[2]
    specs = {
        name: pl.BlockSpec((*array.shape[:-1], COLUMNS), lambda i, j, lead=array.ndim - 1: (*[0] * lead, j))
        for name, array in halves.items()
    }
    return pl.pallas_call(
        functools.partial(_kernel, group, depth),
        grid=(len(rows) // block, columns // COLUMNS),
        in_specs=[pl.BlockSpec((block, rows.shape[1]), lambda i, j: (i, 0)), specs],
        out_specs=pl.BlockSpec((2, block, COLUMNS), lambda i, j: (0, i, j)),
        out_shape=jax.ShapeDtypeStruct((2, len(rows), columns), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name="int4_matmul",
        interpret=interpret,
    )(rows, halves)


def _kernel(group: int, depth: int, rows, refs: dict, out) -> None:
    """A block of both halves: rows [m k]; refs as `_halves` has them; out [2 m columns]."""

    def step(index, totals):
        inputs, of_group = pl.ds(index * depth, depth), lax.div(index * depth, group)
        x, packed = rows[:, inputs], refs["values"]
        integers = _unpacked(packed[inputs, :]) if packed.dtype == jnp.int8 and packed.ndim == 2 else None
        results = []
        for half, total in enumerate(totals):
            weights = integers[half] if integers else packed[half, inputs, :]
            weights = weights.astype(jnp.float32)
            if "offsets" in refs:
                weights -= refs["offsets"][half, of_group, :].astype(jnp.float32)[None, :]
            # Exact in bfloat16: integers of at most 8 bits, and their offsets.
            part = plgpu.dot(x, weights.astype(x.dtype), allow_tf32=False)
            results.append(total + part * refs["scales"][half, of_group, :].astype(jnp.float32)[None, :])
        return tuple(results)

    start = (jnp.zeros(out.shape[1:], jnp.float32),) * 2
    for half, total in enumerate(lax.fori_loop(0, rows.shape[1] // depth, step, start)):
        out[half, :, :] = total


def _unpacked(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high four bits of int8, with their signs."""
    wide = packed.astype(jnp.int32)
    return lax.shift_right_arithmetic(wide << 28, 28), lax.shift_right_arithmetic(wide, 4)
