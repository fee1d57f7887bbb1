"""Attention in memory linear in length: online softmax over blocks of keys, skipping blocks that the mask empties.

Each block of queries lists the blocks of keys that any of its queries may see and visits those alone, forward and
backward. Work is then about t * t / 2 for a causal layer and t * chunk_size for a chunked one, whatever the packing,
padding or cache. Nothing is kept for the backward pass but the inputs, the output and one number per query and head.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Rabe and Staats, "Self-attention
Does Not Need O(n^2) Memory" (2021); the backward pass of Dao et al., "FlashAttention" (2022), appendix B.
Difference from them: which blocks are visible depends on data, hence loops of dynamic length over compacted lists.
"""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.attention import blocks
from llama4_jax.kernels.attention.blocks import Blocking, Tokens


def attend(
    query: jax.Array,
    key: jax.Array | QuantizedArray,
    value: jax.Array | QuantizedArray,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    chunk_size: int | None,
    blocking: Blocking | None = None,
) -> jax.Array:
    """As `reference.attend`, in memory linear in t and s; [b t n h] in the query's dtype.

    Differentiable once, in reverse mode only. Under `jax.vmap` every row of the new axis takes as many steps as the
    longest.

    Args:
        query: [b t n h].
        key, value: [b s k h], where k divides n. Those of few bits, as a cache may hold, get no gradient.
        query_positions, query_segments: [b t] int, see `mask.visible`.
        key_positions, key_segments: [b s] int.
        chunk_size: positions in a chunk, or None.
        blocking: block sizes to use instead of those of `blocks.choose`; lengths need not be multiples of them.
    """
    rows = query.shape[0] * query.shape[2]
    blocking = blocking or blocks.choose(rows, query.shape[1], key.shape[1], chunk_size)
    queries, keys = Tokens(query_positions, query_segments), Tokens(key_positions, key_segments)
    if isinstance(key, QuantizedArray):
        return forward(blocking, query, key, value, queries, keys, query.dtype)[0]
    return _attend(blocking, query, key, value, queries, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocking: Blocking, query, key, value, queries: Tokens, keys: Tokens) -> jax.Array:
    return forward(blocking, query, key, value, queries, keys, query.dtype)[0]


def _attend_forward(blocking: Blocking, query, key, value, queries: Tokens, keys: Tokens):
    parts = forward(blocking, query, key, value, queries, keys, query.dtype)
    out, log_sum = (checkpoint_name(part, "attended") for part in parts)  # worth keeping where all else is recomputed
    return out, (query, key, value, queries, keys, out, log_sum)


def _attend_backward(blocking: Blocking, saved, cotangent: jax.Array):
    query, key, value, *_ = saved
    gradients = backward(blocking, *saved, cotangent)
    return *(gradient.astype(x.dtype) for gradient, x in zip(gradients, (query, key, value))), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(blocking: Blocking, query, key, value, queries: Tokens, keys: Tokens, dtype):
    """Attention [b t n h] in `dtype`, and the log-sum-exp of each row's scores, [b t n] in float32 at least.

    The log-sum-exp is -inf where nothing is seen.
    """
    scale, wide = query.shape[-1] ** -0.5, jnp.promote_types(query.dtype, jnp.float32)
    padded_key, padded_value = jax.tree.map(lambda x: blocks.pad(x, blocking.keys), (key, value))
    key_tokens = blocks.cut_tokens(keys, blocking.keys)
    key_extent = blocks.extent(key_tokens)

    def one_query_block(_, block):
        query_block, query_tokens = block  # [b k g t h]

        def step(carry, index, rule):
            peak, total, out = carry
            key_block, value_block = (  # [b s k h]; of few bits one block at a time becomes what it stands for
                jnp.asarray(jax.tree.map(lambda x: blocks.take(x, index, blocking.keys), each))
                for each in (padded_key, padded_value)
            )
            scores = jnp.einsum("bkgth,bskh->bkgts", query_block, key_block, preferred_element_type=wide)
            scores = jnp.where(rule, scores * scale, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            shrink = jnp.exp(peak - new_peak)
            total = shrink * total + weights.sum(-1)
            weights = weights.astype(value_block.dtype)  # the second product runs in the inputs' precision
            seen = jnp.einsum("bkgts,bskh->bkgth", weights, value_block, preferred_element_type=wide)
            return new_peak, total, shrink[..., None] * out + seen

        rows = query_block.shape[:-1]
        # The lowest number, not -inf: -inf - -inf is no number.
        start = (jnp.full(rows, jnp.finfo(wide).min, wide), jnp.zeros(rows, wide), jnp.zeros(query_block.shape, wide))
        peak, total, out = blocks.fold_visible(step, start, query_tokens, key_tokens, key_extent, blocking.chunk_size)
        some = jnp.where(total > 0, total, 1.0)
        log_sum = jnp.where(total > 0, peak + jnp.log(some), -jnp.inf)
        return None, ((out / some[..., None]).astype(dtype), log_sum[..., None])

    query_blocks = _cut_queries(query, blocking.queries, key.shape[2])
    query_tokens = blocks.cut_tokens(queries, blocking.queries)
    _, (out, log_sum) = lax.scan(one_query_block, None, (query_blocks, query_tokens))
    return _join_queries(out, query.shape[1]), _join_queries(log_sum, query.shape[1])[..., 0]


def backward(blocking: Blocking, query, key, value, queries: Tokens, keys: Tokens, out, log_sum, cotangent):
    """Gradients of query, key and value in float32 at least; the weights are computed again, block by block.

    `out` and `log_sum` may be those over more keys than these, as where the keys are spread over devices: the result is
    then the part of the gradient that these keys have in.
    """
    scale, wide = query.shape[-1] ** -0.5, jnp.promote_types(query.dtype, jnp.float32)
    padded_key, padded_value = blocks.pad(key, blocking.keys), blocks.pad(value, blocking.keys)
    key_tokens = blocks.cut_tokens(keys, blocking.keys)
    key_extent = blocks.extent(key_tokens)
    # +inf makes the weights exp(score - inf) of a row that sees nothing 0.
    log_sum = jnp.where(jnp.isneginf(log_sum), jnp.inf, log_sum)

    def one_query_block(key_value_grads, block):
        query_block, cotangent_block, mean_block, log_sum_block, query_tokens = block  # [b k g t ...]

        def step(carry, index, rule):
            query_grad, key_grad, value_grad = carry
            key_block = blocks.take(padded_key, index, blocking.keys)  # [b s k h]
            value_block = blocks.take(padded_value, index, blocking.keys)
            scores = jnp.einsum("bkgth,bskh->bkgts", query_block, key_block, preferred_element_type=wide)
            weights = jnp.exp(jnp.where(rule, scores * scale, -jnp.inf) - log_sum_block)
            pull = jnp.einsum("bkgth,bskh->bkgts", cotangent_block, value_block, preferred_element_type=wide)
            scores_grad = (weights * (pull - mean_block) * scale).astype(query.dtype)
            weights = weights.astype(query.dtype)
            query_grad += jnp.einsum("bkgts,bskh->bkgth", scores_grad, key_block, preferred_element_type=wide)
            to_keys = jnp.einsum("bkgts,bkgth->bskh", scores_grad, query_block, preferred_element_type=wide)
            to_values = jnp.einsum("bkgts,bkgth->bskh", weights, cotangent_block, preferred_element_type=wide)
            return query_grad, blocks.add(key_grad, index, to_keys), blocks.add(value_grad, index, to_values)

        start = (jnp.zeros(query_block.shape, wide), *key_value_grads)
        query_grad, *key_value_grads = blocks.fold_visible(
            step, start, query_tokens, key_tokens, key_extent, blocking.chunk_size
        )
        return tuple(key_value_grads), query_grad

    # The mean of `pull` under a row's weights, since the output is the mean of the values.
    mean = (cotangent.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)  # [b t n 1]
    cut = (_cut_queries(x, blocking.queries, key.shape[2]) for x in (query, cotangent, mean, log_sum[..., None]))
    start = (jnp.zeros(padded_key.shape, wide), jnp.zeros(padded_value.shape, wide))
    (key_grad, value_grad), query_grad = lax.scan(
        one_query_block, start, (*cut, blocks.cut_tokens(queries, blocking.queries))
    )
    return _join_queries(query_grad, query.shape[1]), *(x[:, : key.shape[1]] for x in (key_grad, value_grad))


def _cut_queries(array: jax.Array, size: int, kv_heads: int) -> jax.Array:
    """[b t n h] -> [blocks b k g size h]: tokens, and heads that read one key-value head, are rows of one matrix."""
    return einops.rearrange(blocks.pad(array, size), "b (q t) (k g) h -> q b k g t h", t=size, k=kv_heads)


def _join_queries(array: jax.Array, length: int) -> jax.Array:
    """The inverse of `_cut_queries`, filling dropped."""
    return einops.rearrange(array, "q b k g t h -> b (q t) (k g) h")[:, :length]
