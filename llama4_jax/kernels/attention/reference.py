"""Attention as in the paper, holding every score: the specification that the other implementations are tested against.

Source: Vaswani et al., "Attention Is All You Need", section 3.2; grouped heads from Ainslie et al., "GQA" (2023).
Difference from them: a query that sees nothing gives zeros, and so do its gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.kernels.attention import mask


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    chunk_size: int | None,
) -> jax.Array:
    """Each query's average of the values that `mask.visible` lets it see; [b t n h] in the query's dtype.

    Weights are the softmax of query . key / sqrt(h), taken in float32 whatever the inputs' dtype. Query head i reads
    key-value head i // (n / k). Memory grows with t * s.

    Args:
        query: [b t n h].
        key, value: [b s k h], where k divides n.
        query_positions, query_segments: [b t] int, see `mask.visible`.
        key_positions, key_segments: [b s] int.
        chunk_size: positions in a chunk, or None.
    """
    rule = mask.visible(query_positions, key_positions, query_segments, key_segments, chunk_size)  # [b t s]
    key, value = jnp.asarray(key), jnp.asarray(value)  # those of few bits become what they stand for
    return average(_scores(query, key), value, rule[:, None, None]).astype(query.dtype)


def attend_all(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """As `attend`, every query seeing every key (bidirectional, as in the vision tower); [b t n h]."""
    return average(_scores(query, key), value, None).astype(query.dtype)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """query . key / sqrt(h), [b k g t s] in float32 at least."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = einops.rearrange(query, "b t (k g) h -> b k g t h", k=key.shape[2])
    # Scale the scores, not the query: in bfloat16 that would round once more.
    return jnp.einsum("bkgth,bskh->bkgts", grouped, key, preferred_element_type=wide) * query.shape[-1] ** -0.5


def weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sums of values [b s k h] by weights [b k g t s]: [b k g t h] in the weights' dtype."""
    return jnp.einsum("bkgts,bskh->bkgth", weights, value.astype(weights.dtype), preferred_element_type=weights.dtype)


def average(
    scores: jax.Array,
    value: jax.Array,
    rule: jax.Array | None,
    value_scales: jax.Array | None = None,
    weighted: Callable[[jax.Array, jax.Array], jax.Array] = weighted,
) -> jax.Array:
    """Values [b s k h] weighted by the softmax of scores [b k g t s] under `rule`: [b t n h], in the scores' dtype.

    rule: bool, broadcast against the scores; None sees all. value_scales: what each value is multiplied by, likewise.
    weighted: another way to do what `weighted` does.
    """
    if rule is not None:
        scores = jnp.where(rule, scores, -jnp.inf)
    # The lowest number stands in for the -inf of a row that sees nothing, whose total is then 0 and not nan.
    peak = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - lax.stop_gradient(peak))
    total = weights.sum(-1, keepdims=True)  # [b k g t 1]
    weights = weights if value_scales is None else weights * value_scales
    out = weighted(weights, value) / jnp.where(total > 0, total, 1.0)
    return einops.rearrange(out, "b k g t h -> b t (k g) h")
