"""How far two right programs may differ that round rows to int8: by flips, numbers near a tie that fall on either side of it.

Sums in another order err by `CONFIDENCE * sqrt(n) * 2**-24` of their terms (`budget`), 4e-6 for n = 128. Rounding a row errs like
noise that is uniform over one step, a 127th of its largest number (Widrow and Kollar, "Quantization Noise", 2008): 2e-3 of it, 570
times as much. So where nothing flips, outputs differ by less than a 570th of what rounding did to them, and where one number
does, by a whole step. Noise moves each number by step / sqrt(12) on average, so that one flip moves no output further than
sqrt(12) = 3.5 standard deviations of what the noise of all numbers does: two far-reaching flips in one row stay below `CONFIDENCE`.

A number flips if it is nearer to a tie than sums err, which are 4e-6 of 127 steps: one in a thousand at most, and one in 20,000 as
measured. Most rows of a small model then have no flip.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.testing import budget

UNFLIPPED = 1 / 570  # of the noise of rounding


def flipped(found, wanted, unrounded) -> np.ndarray:
    """Which rows of outputs [.. t v] of two programs that round differ by more than sums in another order, [.. t]: at most half.

    unrounded: the output of a program that does not round, which tells how much rounding moves each row. Raises AssertionError
    where most rows differ, and where any differs by more than flips allow.
    """
    found, wanted, unrounded = (np.asarray(each, np.float64) for each in (found, wanted, unrounded))
    noise = np.sqrt(np.mean(np.square(wanted - unrounded), axis=-1))  # [.. t]
    share = np.abs(found - wanted).max(-1) / noise
    assert share.max() <= budget.CONFIDENCE, f"a row is off by {share.max()} standard deviations of rounding"
    where = share > budget.CONFIDENCE * UNFLIPPED
    assert np.mean(where) <= 0.5, (
        f"{np.mean(where):.0%} of rows differ, by {np.median(share)} of the noise in the middle"
    )
    return where


def unrounded(model: nnx.Module) -> nnx.Module:
    """`model` with the same weights, whose products take rows as they are."""
    is_held = lambda node: isinstance(node, QuantizedArray)  # noqa: E731
    keep = lambda node: dataclasses.replace(node, activations=None) if is_held(node) else node  # noqa: E731
    return jax.tree.map(keep, model, is_leaf=is_held)
