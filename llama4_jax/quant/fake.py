"""Parameters as rounding to few bits will leave them, with gradients that pass through it: quantisation-aware training.

    loss(structure.merge(fake.fake(params, specs)))          # trains `params`
    structure.merge(fake.packed(params, specs))              # the same numbers in few bits
    params = params | fake.learned(params, specs)            # before training, to learn ranges as well

Rounded parameters are plain arrays, of which modules know nothing. Only where a spec rounds a product's inputs too are they
`QuantizedArray`s, with floats that hold the integers for values: products round their rows where they meet one.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3, with gradients as in `core.quantized.nearest`. Learned ranges are the
step sizes of Esser et al. 2019, arXiv:1902.08153, in the form of Shao et al. 2023, arXiv:2308.13137, equation 2: as a share of
each block's extent, which is about 1 whatever the weights are, so that Adam's steps suit it; without the sigmoid there.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import forms

Params = dict[str, jax.Array | QuantizedArray]
Specs = Mapping[str, QuantSpec]

RANGE = ".range"  # what follows a parameter's name in that of its learned range
_LEAST = 0.125  # of a block's extent: below, training has lost its way, and the scale must stay positive


def fake(params: Mapping[str, jax.Array], specs: Specs) -> Params:
    """`params` with those in `specs` rounded as `packed` rounds them, bit for bit; learned ranges are used and left out.

    Gradients of weights pass straight through where nothing is clipped. Ranges that are not learned have none.
    """
    return _mapped(_faked, params, specs)


def packed(params: Mapping[str, jax.Array], specs: Specs) -> Params:
    """`params` with those in `specs` as `QuantizedArray`s of few bits, by the same ranges; for use after training."""
    return _mapped(_packed, params, specs)


def exact(params: Mapping[str, jax.Array]) -> Params:
    """`params` without the learned ranges among them: those of the model."""
    return {name: array for name, array in params.items() if not name.endswith(RANGE)}


def learned(params: Mapping[str, jax.Array], specs: Specs) -> Params:
    """Ranges to train beside `params`, by name: the share of each block's extent that is kept, at first all of it."""
    return {
        name + RANGE: jnp.ones(quantized.scales_shape(params[name].shape, _inputs(name, params), spec.group))
        for name, spec in specs.items()
    }


def _mapped(function, params: Mapping[str, jax.Array], specs: Specs) -> Params:
    unknown = sorted(set(specs) - set(params))
    if unknown:
        raise ValueError(
            f"specs name {unknown[0]}, which is no parameter; make them with quant.recipe.specs(params, ..)"
        )

    def kept(name: str) -> jax.Array | float:
        share = params.get(name + RANGE)
        return 1.0 if share is None else jnp.maximum(share, _LEAST)

    return {
        name: function(array, specs[name], _inputs(name, params), kept(name)) if name in specs else array
        for name, array in exact(params).items()
    }


def _faked(weight: jax.Array, spec: QuantSpec, inputs: tuple[int, ...], kept) -> jax.Array | QuantizedArray:
    ranges = quantized.ranges(jax.lax.stop_gradient(weight), spec, inputs, clip=kept)
    # The numbers that are stored, in float32: a block's gradients add up in the dtype of its scale.
    scales, offsets = (part if part is None else part.astype(jnp.float32) for part in ranges)
    values = quantized.round_to(weight, scales, offsets, spec.values)
    held = QuantizedArray(values, scales, offsets, jnp.dtype(weight.dtype).name, spec.activations)
    return held if spec.activations else held.dequantize()


def _packed(weight: jax.Array, spec: QuantSpec, inputs: tuple[int, ...], kept) -> QuantizedArray:
    return quantized.quantize(weight, spec, inputs, clip=kept)


def _inputs(name: str, params: Mapping[str, jax.Array]) -> tuple[int, ...]:
    return forms.inputs_of(name, params[name].ndim)
