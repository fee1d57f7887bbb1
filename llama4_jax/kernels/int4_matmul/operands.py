"""What the kernels for TPUs and GPUs are given: a product's rows and weight, in the form that they multiply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray, spread

DEPTH = 128  # inputs that a matrix unit sums over at once
SPAN = 512  # inputs multiplied at a time, where more of them share a scale
SUBLANES = 8  # rows of a register: what weights of a group shorter than DEPTH fill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """arrays, by name:

    rows [m k]: bfloat16 or float32, or int8 for int8 matrix units.
    row_scales [m 1] float32: where rows were rounded.
    values [e k n], scales [e groups n]: of the weight, with e = 1 if it is one matrix.
    offsets [e groups n] and sums [m groups] float32, of rows over each group: where the weight has offsets.
    """

    group: int  # inputs that share a scale
    arrays: dict[str, jax.Array]

    @classmethod
    def make(cls, x: jax.Array, weight: QuantizedArray, *, leading: int, int8: bool, over=()) -> Operands:
        """Of x [m k] and weight with `leading` axes before k. int8: whether there are matrix units for it; over: see `api`.

        Raises NotImplementedError for what `refusal` names.
        """
        reason = refusal(x.dtype, weight, leading)
        if reason:
            raise NotImplementedError(f"kernels of few-bit products do not do {reason}; use 'xla'")
        values, scales, offsets = (
            part if part is None else _stacked(part, weight, leading)
            for part in (weight.values, weight.scales, weight.offsets)
        )
        group = values.shape[1] // scales.shape[1]
        arrays = {"rows": x, "values": values, "scales": scales}
        if weight.activations is not None:
            rows, arrays["row_scales"] = quantized.quantize_rows(x, weight.activations, over=over)
            whole = group % DEPTH == 0 or scales.shape[1] == 1
            in_int8 = int8 and whole and rows.dtype == jnp.int8 and jnp.issubdtype(values.dtype, jnp.integer)
            arrays["rows"] = rows if in_int8 else rows.astype(x.dtype)  # exact: 8 bits
        if offsets is not None:
            parts = arrays["rows"].reshape(x.shape[0], -1, group).astype(jnp.float32)
            arrays |= {"offsets": offsets, "sums": parts.sum(-1)}
        return cls(group=group, arrays=arrays)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product: m, n."""
        return self.arrays["rows"].shape[0], self.arrays["values"].shape[2]

    def specs(self, kernel, place: Callable) -> dict[str, pl.BlockSpec]:
        """Which block of each array a step of the grid is given; place: from its indices, those of row, matrix, column."""

        def of_rows(width):
            return pl.BlockSpec((kernel.rows, width), lambda *index: (place(*index)[0], 0))

        def of_matrix(height):
            return pl.BlockSpec((None, height, kernel.columns), lambda *index: (place(*index)[1], 0, place(*index)[2]))

        by_row = {"rows", "row_scales", "sums"}
        return {
            name: of_rows(array.shape[1]) if name in by_row else of_matrix(array.shape[1])
            for name, array in self.arrays.items()
        }

    def cost(self, dtype) -> pl.CostEstimate:
        """What the compiler may assume: a row visits one matrix, so no more of them are read than there are rows."""
        rows, columns = self.shape
        bits = 0
        for array in self.arrays.values():
            unread = max(0, array.shape[0] - rows) if array.ndim == 3 else 0
            bits += array.size // array.shape[0] * (array.shape[0] - unread) * jax.dtypes.itemsize_bits(array.dtype)
        return pl.CostEstimate(
            flops=2 * rows * columns * self.arrays["rows"].shape[1],
            bytes_accessed=bits // 8 + rows * columns * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        )


def refusal(dtype, weight: QuantizedArray, leading: int) -> str | None:
    """What of a product the kernels cannot do, in words, or None."""
    held = weight.values.dtype
    if held.itemsize > 1 or not (jnp.issubdtype(held, jnp.integer) or held == jnp.float8_e4m3fn):
        return f"values of {held}, only of int4, int8 and float8_e4m3fn"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows of {dtype}, only of bfloat16 and float32"
    inputs, groups = weight.shape[leading], weight.scales.shape[leading]
    group = inputs // groups
    if groups > 1 and group % DEPTH and (DEPTH % group or group % SUBLANES):
        return f"groups of {group} inputs, only all of them, multiples of {DEPTH}, and parts of it by {SUBLANES}"
    return None


def _stacked(part: jax.Array, weight: QuantizedArray, leading: int) -> jax.Array:
    """Values, scales or offsets as [e k or groups n]: a scale that several matrices or outputs share is repeated."""
    inputs = part.shape[leading]
    matrices, outputs = weight.shape[:leading], weight.shape[leading + 1 :]
    return spread(part, (*matrices, inputs, *outputs)).reshape(math.prod(matrices), inputs, math.prod(outputs))
