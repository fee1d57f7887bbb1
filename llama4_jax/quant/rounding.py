"""Rounding to nearest, with a search for the part of each block's range that is worth keeping.

A block's largest weight sets the step of all the others. Clipping it makes the step smaller: the largest weights get worse and
all others better, and a search over a few fractions of the range finds what costs least.

Source: the search over clipping of AWQ (Lin et al. 2023, arXiv:2306.00978, `auto_clip`), by error in the weights, or, with
`importance`, in the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray

WHOLE = (1.0,)  # no clipping
CLIPS = tuple(1.0 - step / 20 for step in range(11))  # 1.0, 0.95 .. 0.5 of a block's range


def nearest(
    weight: jax.Array,
    spec: QuantSpec,
    inputs: Sequence[int],
    *,
    clips: Sequence[float] = CLIPS,
    importance: jax.Array | None = None,
) -> QuantizedArray:
    """`weight` rounded to nearest, each scale with the best of `clips`; inputs and importance as in `best_clip`."""
    clip = clips[0] if len(clips) == 1 else best_clip(weight, spec, inputs, clips=clips, importance=importance)
    return quantized.quantize(weight, spec, inputs, clip=clip)


def best_clip(
    weight: jax.Array,
    spec: QuantSpec,
    inputs: Sequence[int],
    *,
    clips: Sequence[float] = CLIPS,
    importance: jax.Array | None = None,
) -> jax.Array:
    """The one of `clips` with the least squared error, for each scale: an array of the shape of scales.

    inputs: the axes that a product sums over, outermost first. importance: what a weight's squared error counts, of a shape
    that broadcasts to the weight's: the mean square of its input makes this the error of the products, were inputs
    uncorrelated. None: all alike. Of equally good clips the first is taken.
    """
    weight = weight.astype(jnp.float32)  # the error of rounding alone, not that of the weight's dtype
    parts = quantized.scales_shape(weight.shape, inputs, spec.group)
    importance = jnp.ones((), jnp.float32) if importance is None else importance

    def error(clip: jax.Array) -> jax.Array:
        difference = quantized.quantize(weight, spec, inputs, clip=clip).dequantize() - weight
        return _block_sums(importance * jnp.square(difference), parts)

    tried = jnp.asarray(clips, jnp.float32)
    return tried[jnp.argmin(jax.lax.map(error, tried), axis=0)]


def _block_sums(array: jax.Array, parts: Sequence[int]) -> jax.Array:
    """Sums over the blocks of an array, of which there are `parts` along each axis."""
    shape = [n for size, part in zip(array.shape, parts) for n in (part, size // part)]
    return array.reshape(shape).sum(axis=tuple(range(1, len(shape), 2)))
