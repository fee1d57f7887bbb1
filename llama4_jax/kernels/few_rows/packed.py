"""Weights of few bits as a CPU reads them: matrices [n k] in blocks of 32 weights, int4 two a byte.

XLA's CPU backend multiplies int8 and int4 matrices with float rows at a small part of float32's speed, and does not pack int4.
`low_bit.cc` reads this layout; whatever it does not do multiplies with `Packed.unpack`.
"""

from __future__ import annotations

import dataclasses
import math

import einops
import jax
import jax.numpy as jnp

from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Stands for the matrices [.. n k] of a `QuantizedArray`, each transposed: an output is a row, read from first to last.

    Invariants:
      values [.. n bytes] uint8: for each group of inputs, its weights filled up to whole blocks of 32. A block is 32 bytes of
        int8 or float8, or 16 bytes of int4: byte i holds weight i, plus 8, in its low half and weight 16 + i in its high half.
      scales [.. n groups] float32; offsets, None or like scales, as in a `QuantizedArray`.
      k is a multiple of groups.
    """

    values: jax.Array
    scales: jax.Array
    offsets: jax.Array | None
    kind: str = dataclasses.field(metadata={"static": True})  # the dtype of the values, before they were packed
    k: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})  # of the array it stands for
    activations: str | None = dataclasses.field(default=None, metadata={"static": True})  # of it; see QuantSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.k)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def __getitem__(self, index) -> Packed:
        """Itself for `...`, which is how parameters are read; else some of its rows, or of its matrices."""
        return self if index is Ellipsis else jax.tree.map(lambda part: part[index], self)

    def unpack(self) -> jax.Array:
        """The float32 matrices [.. n k] that it stands for: what `QuantizedArray.dequantize` gives, transposed."""
        *leading, groups = self.scales.shape
        group = self.k // groups
        values = self.values.reshape(*leading, groups, -1)
        if self.kind == "int4":
            pairs = einops.rearrange(values, "... (block byte) -> ... block 1 byte", byte=BLOCK // 2)
            halves = jnp.concatenate([pairs & 15, pairs >> 4], axis=-2).astype(jnp.int8) - 8
            values = halves.reshape(*leading, groups, -1)
        else:
            values = jax.lax.bitcast_convert_type(values, self.kind)
        values = values[..., :group].astype(jnp.float32)
        if self.offsets is not None:
            values = values - self.offsets[..., None]
        return (values * self.scales[..., None]).reshape(*leading, self.k)

    def filled(self, rows: jax.Array) -> jax.Array:
        """rows [m k] with zeros where a group of the weights is filled up."""
        groups = self.scales.shape[-1]
        missing = -(self.k // groups) % BLOCK
        if not missing:
            return rows
        rows = rows.reshape(rows.shape[0], groups, -1)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, missing))).reshape(rows.shape[0], -1)


def pack(weight: QuantizedArray, num_inputs: int, leading: int = 0) -> Packed:
    """`weight` [leading.. inputs.. outputs..] as matrices [leading.. n k], of n outputs and k inputs.

    Raises ValueError if what shares a scale is not successive inputs of one output.
    """
    start, stop = leading, leading + num_inputs
    values = _matrices(weight.values, start, stop)
    scales = _matrices(_of_outputs(weight.scales, weight, start, stop), start, stop).astype(jnp.float32)
    offsets = weight.offsets
    if offsets is not None:
        offsets = _matrices(_of_outputs(offsets, weight, start, stop), start, stop).astype(jnp.float32)
    kept = _blocks(values, scales.shape[-1]), scales, offsets
    return Packed(*kept, values.dtype.name, values.shape[-1], weight.dtype, weight.activations)


def join(matrices: list[Packed]) -> Packed:
    """Matrices [n k] of the same form below each other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *matrices)


def can_pack(weight) -> bool:
    """Whether it is held in few bits, and not in the floats in which such weights are trained."""
    return isinstance(weight, QuantizedArray) and weight.values.dtype.itemsize == 1


def _of_outputs(scales: jax.Array, weight: QuantizedArray, start: int, stop: int) -> jax.Array:
    """Scales or offsets with an entry for each output."""
    parts, sizes = scales.shape[start:stop], weight.shape[start:stop]
    inner = next((i for i, part in enumerate(parts) if part < sizes[i]), len(parts))
    if math.prod(parts[inner + 1 :]) != 1:
        raise ValueError(
            f"scales {scales.shape} of {weight.shape} are not those of successive inputs; quantise it anew"
        )
    return quantized.spread(scales, (*weight.shape[:start], *parts, *weight.shape[stop:]))


def _matrices(array: jax.Array, start: int, stop: int) -> jax.Array:
    """[leading.. inputs.. outputs..] as [leading.. n k]."""
    shape = array.shape
    return array.reshape(*shape[:start], math.prod(shape[start:stop]), -1).swapaxes(-1, -2)


def _blocks(values: jax.Array, groups: int) -> jax.Array:
    """Values [.. n k] as bytes; see `Packed`."""
    *leading, k = values.shape
    values = values.reshape(*leading, groups, -1)
    four = values.dtype == jnp.int4
    values = (
        (values.astype(jnp.int8) + 8).astype(jnp.uint8) if four else jax.lax.bitcast_convert_type(values, jnp.uint8)
    )
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % BLOCK)])
    if four:
        halves = einops.rearrange(values, "... (block half byte) -> half ... (block byte)", half=2, byte=BLOCK // 2)
        values = halves[0] | halves[1] << 4
    return values.reshape(*leading, -1)
