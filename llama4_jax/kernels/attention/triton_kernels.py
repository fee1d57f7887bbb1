"""The kernels of `triton`: one block of queries, or of keys, of one row and head.

Scores are to base 2, as the hardware's exponential is. A key is seen from its own place on, within its run; run 0 is padding.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOWEST = float(jnp.finfo(jnp.float32).min)  # not -inf: -inf - -inf is no number


def forward(block: int, scale: float, first, query_ref, key_value, numbers, out_ref, log_sum_ref):
    """A block of the output, and of the log-sum-exp of its scores.

    Refs: first []; query and out [t h] of a block; log_sum [t] of one; key, value [s h] and numbers [s] of a row.
    """
    key_ref, value_ref = key_value
    own, query = pl.program_id(0), query_ref[...]

    def step(index, carry):
        peak, total, out = carry
        keys = pl.ds(index * block, block)
        scores = plgpu.dot(query, key_ref[keys, :].T) * (scale * math.log2(math.e))  # [t s]
        scores = jnp.where(_visible(numbers, own, index, block), scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights, shrink = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
        seen = plgpu.dot(weights.astype(value_ref.dtype), value_ref[keys, :])
        return new_peak, shrink * total + weights.sum(-1), shrink[:, None] * out + seen

    start = (jnp.full(block, LOWEST, jnp.float32), jnp.zeros(block, jnp.float32), jnp.zeros(query.shape, jnp.float32))
    peak, total, out = lax.fori_loop(first[...], own + 1, step, start)
    some = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (out / some[:, None]).astype(out_ref.dtype)
    # +inf makes the weights exp2(score - inf) of a row that sees nothing 0.
    log_sum_ref[...] = jnp.where(total > 0, peak + jnp.log2(some), jnp.inf)


def query_gradient(block: int, scale: float, first, of_queries, key_value, numbers, grad_ref):
    """A block of the gradient of queries.

    Refs: as `forward`; of_queries: query; pull, the output's gradient, [t h]; log_sum; mean [t], that of pull . value under
    the weights; grad [t h].
    """
    query_ref, pull_ref, log_sum_ref, mean_ref = of_queries
    key_ref, value_ref = key_value
    own, query, pull = pl.program_id(0), query_ref[...], pull_ref[...]
    log_sum, mean = log_sum_ref[...][:, None], mean_ref[...][:, None]

    def step(index, grad):
        keys = pl.ds(index * block, block)
        key = key_ref[keys, :]
        weights = _weights(plgpu.dot(query, key.T), scale, _visible(numbers, own, index, block), log_sum)
        scores_grad = weights * (plgpu.dot(pull, value_ref[keys, :].T) - mean) * scale  # [t s]
        return grad + plgpu.dot(scores_grad.astype(key.dtype), key)

    grad = lax.fori_loop(first[...], own + 1, step, jnp.zeros(query.shape, jnp.float32))
    grad_ref[...] = grad.astype(grad_ref.dtype)


def key_gradients(
    block: int, scale: float, group: int, end, of_queries, key_value, numbers, key_grad_ref, value_grad_ref
):
    """A block of the gradients of keys and values, over the `group` of heads that read them.

    Refs: end []; key, value and their gradients [s h] of a block; of_queries: query and pull [t g h], log_sum and mean
    [g t]; numbers [t] of a row.
    """
    query_ref, pull_ref, log_sum_ref, mean_ref = of_queries
    key_ref, value_ref = key_value
    own, key, value = pl.program_id(0), key_ref[...], value_ref[...]
    zeros = jnp.zeros(key.shape, jnp.float32)

    def of_head(head, carry):
        def step(index, carry):
            key_grad, value_grad = carry
            queries = pl.ds(index * block, block)
            query, pull = query_ref[queries, head, :], pull_ref[queries, head, :]
            log_sum, mean = log_sum_ref[head, queries][:, None], mean_ref[head, queries][:, None]
            weights = _weights(plgpu.dot(query, key.T), scale, _visible(numbers, index, own, block), log_sum)
            scores_grad = weights * (plgpu.dot(pull, value.T) - mean) * scale  # [t s]
            key_grad += plgpu.dot(scores_grad.astype(query.dtype).T, query)
            value_grad += plgpu.dot(weights.astype(pull.dtype).T, pull)
            return key_grad, value_grad

        return lax.fori_loop(own, end[...], step, carry)

    key_grad, value_grad = lax.fori_loop(0, group, of_head, (zeros, zeros))
    key_grad_ref[...] = key_grad.astype(key_grad_ref.dtype)
    value_grad_ref[...] = value_grad.astype(value_grad_ref.dtype)


def _visible(numbers, queries: jax.Array, keys: jax.Array, block: int) -> jax.Array:
    """Which tokens of one block see which of another; bool [t s]."""
    place = jnp.arange(block)
    query_runs, key_runs = (numbers[pl.ds(index * block, block)] for index in (queries, keys))
    causal = (queries * block + place)[:, None] >= (keys * block + place)[None, :]
    return causal & (query_runs[:, None] == key_runs[None, :]) & (query_runs != 0)[:, None]


def _weights(products: jax.Array, scale: float, rule: jax.Array, log_sum: jax.Array) -> jax.Array:
    scores = jnp.where(rule, products * (scale * math.log2(math.e)), -jnp.inf)
    return jnp.exp2(scores - log_sum)
