"""Arrays held in few bits: small values and the scales that they are multiplied by.

A `QuantizedArray` takes the place of a weight inside its `nnx.Param`. Modules need not know: wherever JAX wants an array it
is the array that it stands for. Products that do know read the few bits (`kernels.int4_matmul`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llama4_jax.config.quant import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """Stands for `(values - offsets) * scales`, computed in float32 and rounded once to `dtype`.

    Invariants:
      values has the shape of the array it stands for; int4, int8 or float8_e4m3fn, or a float dtype that holds such
        numbers while they are trained (`quant.fake`).
      scales has as many axes as values, each of a size that divides that of values: entry i of an axis is the scale of
        the i-th of as many equal blocks. Positive and finite; a block of zeros has scale 1.
      offsets, None or like scales: the value that stands for 0 (asymmetric integers only).
    """

    values: jax.Array
    scales: jax.Array
    offsets: jax.Array | None = None
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})  # of the array it stands for
    activations: str | None = dataclasses.field(default=None, metadata={"static": True})  # see QuantSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def blocks(self) -> tuple[int, ...]:
        """The size along each axis of what shares a scale."""
        return tuple(size // parts for size, parts in zip(self.values.shape, self.scales.shape))

    @property
    def bits(self) -> int:
        """All that it takes to store: values packed, scales and offsets as they are."""
        parts = [part for part in (self.values, self.scales, self.offsets) if part is not None]
        return sum(part.size * jax.dtypes.itemsize_bits(part.dtype) for part in parts)

    def astype(self, dtype) -> QuantizedArray:
        """The same values, standing for an array of another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype).name)

    def dequantize(self) -> jax.Array:
        """The array that it stands for."""
        values = self.values.astype(jnp.float32)
        if self.offsets is not None:
            values = values - spread(self.offsets, self.shape).astype(jnp.float32)
        return (values * spread(self.scales, self.shape).astype(jnp.float32)).astype(self.dtype)

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __getitem__(self, index) -> QuantizedArray | jax.Array:
        """Itself for `...`, which is how parameters are read; else an entry of the array that it stands for."""
        return self if index is Ellipsis else self.dequantize()[index]


def spread(scales: jax.Array, shape: Sequence[int]) -> jax.Array:
    """One number for each block as one for each entry of an array of `shape`."""
    for axis, size in enumerate(shape):
        if 1 < scales.shape[axis] < size:
            scales = jnp.repeat(scales, size // scales.shape[axis], axis=axis)
    return jnp.broadcast_to(scales, shape)


def scales_shape(shape: Sequence[int], inputs: Sequence[int], group: int | None) -> tuple[int, ...]:
    """The shape of scales where `group` successive inputs of each output share one; inputs: their axes, outermost first.

    Raises ValueError, with the groups that would do, for a group that is no whole part of an axis nor whole axes.
    """
    parts, left = list(shape), math.prod(shape[axis] for axis in inputs) if group is None else group
    for axis in reversed(inputs):
        size = shape[axis]
        if max(left, size) % min(left, size):
            sizes = tuple(shape[axis] for axis in inputs)
            raise ValueError(
                f"group={group} does not divide inputs {sizes}; use {_groups(sizes)}, or None for all of them"
            )
        parts[axis], left = (1, left // size) if left >= size else (size // left, 1)
    if left > 1:
        sizes = tuple(shape[axis] for axis in inputs)
        raise ValueError(
            f"group={group} is more than the inputs {sizes}; use {_groups(sizes)}, or None for all of them"
        )
    return tuple(parts)


def quantize(
    weight: jax.Array, spec: QuantSpec, inputs: Sequence[int], *, clip: jax.Array | float = 1.0
) -> QuantizedArray:
    """`weight` rounded to nearest; inputs: the axes that a product sums over, outermost first.

    clip: which part of each block's range to keep, a number or one for each scale; what is outside goes to the end.
    """
    scales, offsets = ranges(weight, spec, inputs, clip=clip)
    values = round_to(weight, scales, offsets, spec.values).astype(spec.values)
    return QuantizedArray(values, scales, offsets, jnp.dtype(weight.dtype).name, spec.activations)


def ranges(
    weight: jax.Array, spec: QuantSpec, inputs: Sequence[int], *, clip: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array | None]:
    """Scales, and offsets if `spec` is asymmetric, of blocks from their least and greatest weight."""
    shape = scales_shape(weight.shape, inputs, spec.group)
    blocks = _blocked(weight.astype(jnp.float32), shape)
    axes = tuple(range(1, blocks.ndim, 2))
    if spec.symmetric:
        widest = jnp.max(jnp.abs(blocks), axis=axes) * clip
        return _positive(widest / largest(spec.values), spec.scales), None
    low = jnp.minimum(jnp.min(blocks, axis=axes), 0) * clip  # 0 is among the numbers that have a value
    high = jnp.maximum(jnp.max(blocks, axis=axes), 0) * clip
    least, most = _bounds(spec.values)
    scales = _positive((high - low) / (most - least), spec.scales)
    offsets = jnp.round(least - low / scales.astype(jnp.float32))
    return scales, jnp.clip(offsets, least, most).astype(spec.scales)


def round_to(weight: jax.Array, scales: jax.Array, offsets: jax.Array | None, values: str) -> jax.Array:
    """The float32 numbers, all of which dtype `values` holds, that stand for `weight` most closely; see `nearest`."""
    ratio = weight.astype(jnp.float32) / spread(scales, weight.shape).astype(jnp.float32)
    if offsets is not None:
        ratio = ratio + spread(offsets, weight.shape).astype(jnp.float32)
    return nearest(ratio, values, offsets is None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def nearest(ratio: jax.Array, values: str, symmetric: bool = True) -> jax.Array:
    """`ratio` float32 rounded to numbers that dtype `values` holds; symmetric: as far down as up.

    Its gradient is straight through: 1 where rounding moved a number by half a step at most, 0 where the end of the range did.
    Source: Bengio et al. 2013, arXiv:1308.3432; the clipping as in Esser et al. 2019, arXiv:1902.08153, equation 5.
    """
    least, most = _bounds(values)
    if values == "float8_e4m3fn":
        return jnp.clip(ratio, least, most).astype(values).astype(jnp.float32)
    return jnp.clip(jnp.round(ratio), -most if symmetric else least, most)


@nearest.defjvp
def _straight_through(values, symmetric, primals, tangents):
    (ratio,), (tangent,) = primals, tangents
    rounded = nearest(ratio, values, symmetric)
    least, most = _bounds(values)
    half = 16.0 if values == "float8_e4m3fn" else 0.5  # a step, at the ends of the range
    inside = (ratio >= (-most if symmetric else least) - half) & (ratio <= most + half)
    return rounded, jnp.where(inside, tangent, jnp.zeros_like(tangent))


def quantize_rows(
    x: jax.Array, values: str, num_inputs: int = 1, over: Sequence[str] = ()
) -> tuple[jax.Array, jax.Array]:
    """Rows x [.. inputs] rounded to `values`, and their scales float32, of size 1 along inputs.

    over: mesh axes whose devices hold parts of the inputs, inside `jax.shard_map`.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - num_inputs, x.ndim))
    widest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    widest = jax.lax.pmax(widest, tuple(over)) if over else widest
    scales = _positive(widest / largest(values), "float32")
    return round_to(x, scales, None, values).astype(values), scales


def largest(values: str) -> float:
    """The greatest number of a dtype."""
    return _bounds(values)[1]


def _bounds(values: str) -> tuple[float, float]:
    limits = jnp.finfo(values) if values == "float8_e4m3fn" else jnp.iinfo(values)
    return float(limits.min), float(limits.max)


def _positive(scales: jax.Array, dtype: str) -> jax.Array:
    """Scales in the dtype they are kept in, so that what is rounded with them is what they are multiplied with."""
    scales = scales.astype(dtype)
    return jnp.where(scales > 0, scales, jnp.ones_like(scales))


def _blocked(array: jax.Array, parts: Sequence[int]) -> jax.Array:
    """[a b ..] as [parts_a a/parts_a parts_b b/parts_b ..]."""
    shape = [n for size, part in zip(array.shape, parts) for n in (part, size // part)]
    return array.reshape(shape)


def _groups(sizes: Sequence[int]) -> str:
    last = sizes[-1]
    return ", ".join(str(n) for n in range(1, last + 1) if last % n == 0 and (n >= 16 or last < 16)) or str(last)
