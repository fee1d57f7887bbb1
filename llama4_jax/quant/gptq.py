"""Rounding with error feedback: what rounding one input's weights does to a product, the weights not yet rounded make good.

Inputs are rounded one after another. With H the second moments of the inputs, the change of the weights that are left which
undoes most of the error of input i is a multiple of row i of U, where U is upper triangular and U^T U the inverse of H. Updates
wait until a block of inputs is done, so that most of the work is products of matrices.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with scales of a group taken when its first input comes up. U is
found with one Cholesky factor, of H with its axes reversed, and no explicit inverse: H = R R^T with R upper triangular, U = R^-1.
Differences: inputs that never occur are rounded to nearest and not set to 0; ranges may be clipped (`rounding`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import rounding

BLOCK = 128  # inputs between updates of all that are left, at most
DAMPING = 0.01  # of the mean of H's diagonal, added to it


def gptq(
    weight: jax.Array,
    moments: jax.Array,
    spec: QuantSpec,
    inputs: Sequence[int],
    *,
    clips: Sequence[float] = rounding.CLIPS,
    damping: float = DAMPING,
) -> QuantizedArray:
    """`weight` rounded for inputs with these second moments.

    inputs: the axes that a product sums over, outermost first, i numbers in all; moments: [i i], the sum of x x^T over inputs x,
    in the same order. With no off-diagonal moments it is `rounding.nearest` with the diagonal as importance.
    Raises ValueError for moments of another shape, and where they are not finite.
    """
    outputs = [axis for axis in range(weight.ndim) if axis not in inputs]
    order = (*inputs, *outputs)
    size = math.prod(weight.shape[axis] for axis in inputs)
    if moments.shape != (size, size):
        raise ValueError(
            f"wanted moments [{size} {size}] for a weight {weight.shape} with inputs {tuple(inputs)}, "
            f"got {list(moments.shape)}; are they those of its own inputs?"
        )
    parts = quantized.scales_shape(weight.shape, inputs, spec.group)
    matrix = jnp.transpose(weight, order).reshape(size, -1).astype(jnp.float32)  # [i o]
    values, scales, offsets, finite = _rounded(matrix, moments, spec, tuple(clips), damping)
    if not finite:
        raise ValueError("second moments are not finite, or too nearly singular; give more text, or more damping")

    def as_weight(array: jax.Array, shape: Sequence[int]) -> jax.Array:
        return array.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))

    return QuantizedArray(
        as_weight(values, weight.shape).astype(spec.values),
        as_weight(scales, parts),
        None if offsets is None else as_weight(offsets, parts),
        jnp.dtype(weight.dtype).name,
        spec.activations,
    )


@functools.partial(jax.jit, static_argnames=("spec", "clips"))
def _rounded(matrix: jax.Array, moments: jax.Array, spec: QuantSpec, clips: tuple[float, ...], damping: float):
    """Values [i o] float32, scales and offsets [i/group o] of matrix [i o], and whether all of the moments served."""
    size, width = matrix.shape
    group = spec.group or size
    block = next(n for n in range(min(group, BLOCK), 0, -1) if group % n == 0)
    one_group = dataclasses.replace(spec, group=None)
    importance, feedback = jnp.diagonal(moments)[:, None], _feedback(moments, damping)

    def round_group(matrix, start):
        rows = lax.dynamic_slice_in_dim(matrix, start, group)
        weights = lax.dynamic_slice_in_dim(importance, start, group)
        clip = rounding.best_clip(rows, one_group, (0,), clips=clips, importance=weights)  # [1 o]
        scales, offsets = quantized.ranges(rows, one_group, (0,), clip=clip)

        def round_block(matrix, start):
            rows = lax.dynamic_slice_in_dim(matrix, start, block)
            onward = lax.dynamic_slice_in_dim(feedback, start, block)  # [block i], 0 left of the diagonal
            values, errors = _round_block(
                rows, lax.dynamic_slice_in_dim(onward, start, block, 1), scales, offsets, spec
            )
            left = jnp.matmul(onward.T, errors, precision=lax.Precision.HIGHEST)
            return matrix - left, values  # the block itself is not looked at again

        matrix, values = lax.scan(round_block, matrix, start + block * jnp.arange(group // block))
        return matrix, (values, scales, offsets)

    _, (values, scales, offsets) = lax.scan(round_group, matrix, group * jnp.arange(size // group))
    flat = lambda array: None if array is None else array.reshape(-1, width)  # noqa: E731
    return flat(values), flat(scales), flat(offsets), jnp.all(jnp.isfinite(feedback))


def _round_block(rows, feedback, scales, offsets, spec: QuantSpec):
    """Values and scaled errors [block o] of rows [block o], of which each passes its error on to those after it."""

    def round_row(rows, i):
        values = quantized.round_to(rows[i][None], scales, offsets, spec.values)  # [1 o]
        meant = values if offsets is None else values - offsets.astype(jnp.float32)
        error = (rows[i] - (meant * scales.astype(jnp.float32))[0]) / feedback[i, i]  # [o]
        return rows - feedback[i][:, None] * error, (values[0], error)

    return lax.scan(round_row, rows, jnp.arange(rows.shape[0]))[1]


def _feedback(moments: jax.Array, damping: float) -> jax.Array:
    """U [i i], upper triangular: U^T U is the inverse of the moments, damped."""
    mean = jnp.mean(jnp.diagonal(moments))
    damped = moments + jnp.where(mean > 0, damping * mean, 1.0) * jnp.eye(
        moments.shape[0]
    )  # of no rows at all: identity
    factor = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(factor, jnp.eye(moments.shape[0]), lower=False)
