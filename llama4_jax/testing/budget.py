"""Error budgets: how far two correct computations may differ, derived from dtypes and reduction lengths.

A sum of `n` rounded terms in unit roundoff `u` differs from the exact one by at most `CONFIDENCE * sqrt(n) * u` times
the sum of the terms' magnitudes, with probability 1 - 2 n exp(-CONFIDENCE**2 / 2), when rounding errors are independent
of each other. The worst case, `n * u`, is never seen on real data and would let real mistakes pass.

Source: Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

CONFIDENCE = 6.0
"""Standard deviations allowed: 3e-8 is the probability that one term of a sum steps outside."""


def unit_roundoff(dtype) -> float:
    """Largest relative error of rounding to `dtype`: 2**-24 for float32, 2**-8 for bfloat16.

    (`eps` of bfloat16 is 2**-7, the gap between 1 and the next number; rounding errs by half a gap.)
    """
    return float(jnp.finfo(dtype).eps) / 2


def accumulator(dtype) -> jnp.dtype:
    """The dtype in which our kernels add up products of `dtype`: float32, or wider where the input is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul_tolerance(dtype, length: int, magnitude: float = 1.0) -> float:
    """Absolute error allowed to one element of a matrix product whose operands and result are of `dtype`.

    Three roundings: each operand may stand for a number that was rounded to `dtype` (independent errors, so the sum's
    grows as sqrt(length) against length terms), the running sum in the accumulator, and the result.

    Args:
        dtype: of the operands and the result.
        length: number of products in the sum.
        magnitude: the sum of the products' magnitudes, for the element where that is largest.
    """
    summing = CONFIDENCE * math.sqrt(length) * unit_roundoff(accumulator(dtype))
    operands = CONFIDENCE * unit_roundoff(dtype) * math.sqrt(2.0 / max(length, 1))
    return magnitude * (summing + operands + unit_roundoff(dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionBudget:
    """Absolute error allowed to each element of attention's output and of its gradients."""

    output: np.ndarray  # [b t n h]
    query: np.ndarray  # [b t n h]
    key: np.ndarray  # [b s k h]
    value: np.ndarray  # [b s k h]


def attention(dtype, query, key, value, cotangent, visible) -> AttentionBudget:
    """The budget of one attention call whose inputs are exact in `dtype`, against exact arithmetic.

    Errors are followed through the formulas, one standard deviation at a time, and multiplied by `CONFIDENCE` at the
    end. A weight errs, relative to itself, by its score's error, by the normaliser's (the row's mean score error, and
    the rounding of a sum of s terms), and by one rounding to `dtype` before the second product. The gradient of a score
    is `weight * (p - mean(p))` with `p = cotangent . value`, where the mean is taken as cotangent . output. Errors in
    one row of scores are correlated through the normaliser and are added up; those of different rows are independent
    and add in squares.

    Args:
        dtype: what the implementation under test is given and returns.
        query, cotangent: [b t n h].
        key, value: [b s k h].
        visible: bool [b t s].
    """
    groups = query.shape[2] // key.shape[2]
    query, cotangent = (np.asarray(x, np.float64) for x in (query, cotangent))
    key, value = (np.repeat(np.asarray(x, np.float64), groups, axis=2) for x in (key, value))  # [b s n h]
    fine, coarse = unit_roundoff(accumulator(dtype)), unit_roundoff(dtype)
    head_dim, key_length = query.shape[-1], key.shape[1]
    scale, dot_error, sum_error = head_dim**-0.5, fine * head_dim**0.5, fine * key_length**0.5

    def products(left, right):  # [b n t s]: left . right, and the sum of its terms' magnitudes
        return [np.einsum("btnh,bsnh->bnts", f(left), f(right)) for f in (np.asarray, np.abs)]

    scores, scores_size = products(query, key)
    scores = np.where(visible[:, None], scale * scores, -np.inf)
    peak = scores.max(-1, keepdims=True, initial=np.finfo(np.float64).min)
    weights = np.exp(scores - peak)
    weights /= np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)

    # The exponent's argument is a difference from the row's peak, whose size its rounding follows.
    score_error = dot_error * scale * scores_size + fine * np.where(visible[:, None], np.abs(scores - peak), 0.0)
    weight_error = score_error + (weights * score_error).sum(-1, keepdims=True) + sum_error + 2 * fine + coarse
    output = np.einsum("bnts,bsnh->btnh", weights * (weight_error + sum_error + coarse), np.abs(value))

    p, p_size = products(cotangent, value)
    mean, mean_size = (weights * p).sum(-1, keepdims=True), (weights * p_size).sum(-1, keepdims=True)
    mean_error = (weights * weight_error * p_size).sum(-1, keepdims=True) + (dot_error + sum_error + coarse) * mean_size
    gradient_size = scale * weights * np.abs(p - mean)
    gradient_error = (weight_error + coarse) * gradient_size + scale * weights * (dot_error * p_size + mean_error)
    query_error = np.einsum("bnts,bsnh->btnh", gradient_error + (sum_error + coarse) * gradient_size, np.abs(key))

    def over_rows(error, size, row):  # [b s k h]
        """Root of the sum, over the rows of a key head's queries, of squared errors; one rounding of the result."""
        squares = np.einsum("bnts,btnh->bsnh", error**2, row**2)
        sizes = np.einsum("bnts,btnh->bsnh", size, np.abs(row))
        squares, sizes = (x.reshape(*x.shape[:2], -1, groups, head_dim).sum(3) for x in (squares, sizes))
        return np.sqrt(squares) + (fine * (query.shape[1] * groups) ** 0.5 + coarse) * sizes

    floor = float(jnp.finfo(dtype).tiny)  # below it, flushing to zero is no error
    return AttentionBudget(
        output=CONFIDENCE * output + floor,
        query=CONFIDENCE * query_error + floor,
        key=CONFIDENCE * over_rows(gradient_error, gradient_size, query) + floor,
        value=CONFIDENCE * over_rows(weights * weight_error, weights, cotangent) + floor,
    )
