"""Attention of a few queries over many keys: decoding with a cache, where reading the keys is what takes the time.

The reference with its products by `few_rows` where that can. Where it cannot, the first is turned round: keys are the left
operand, so that XLA's CPU backend multiplies them where they lie, in the order [b k s h] of the cache. Left to itself it makes
the shorter operand the left one and copies the keys, at 4,096 of them for 1.9 times the time, and with keys in the order
[b s k h] for 6.8 times. A barrier hides that the result is transposed.

Keys and values of few bits are multiplied as they lie, and products by their scales: a copy of them in more bits would be the
larger part of what is read and written.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import few_rows
from llama4_jax.kernels.attention import mask, reference


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
) -> jax.Array:
    """As `reference.attend`, and like it holds all scores; keys and values of few bits have scales [b s k 1]."""
    rule = mask.visible(query_positions, key_positions, query_segments, key_segments, chunk_size)  # [b t s]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = einops.rearrange(query, "b t (k g) h -> b k (g t) h", k=key.shape[2])
    (key, key_scales), (value, value_scales) = _parts(key), _parts(value)
    products = einops.rearrange(_products(grouped, key, wide), "b k (g t) s -> b k g t s", t=query.shape[1])
    scores = products * query.shape[-1] ** -0.5
    scores = scores if key_scales is None else scores * key_scales
    return reference.average(scores, value, rule[:, None, None], value_scales, _weighted).astype(query.dtype)


def _products(query: jax.Array, key: jax.Array, wide) -> jax.Array:
    """Products of query [b k q h] and key [b s k h], [b k q s]."""
    rows, keys = query.reshape(-1, *query.shape[2:]), einops.rearrange(key, "b s k h -> (b k) s h")
    products = few_rows.each(rows, keys)
    if products is not None:
        return products.reshape(*query.shape[:3], -1)
    # Integers of 8 bits are exact in bfloat16.
    products = jnp.einsum("bskh,bkqh->bksq", key.astype(query.dtype), query, preferred_element_type=wide)
    return einops.rearrange(lax.optimization_barrier(products), "b k s q -> b k q s")


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """As `reference.weighted`."""
    rows = einops.rearrange(weights, "b k g t s -> (b k) (g t) s")
    sums = few_rows.each_plain(rows, einops.rearrange(value, "b s k h -> (b k) s h"))
    return reference.weighted(weights, value) if sums is None else sums.reshape(*weights.shape[:-1], -1)


def _parts(array: jax.Array | QuantizedArray) -> tuple[jax.Array, jax.Array | None]:
    """Numbers [b s k h], and what products with them are multiplied by, broadcast against scores [b k g t s]."""
    if not isinstance(array, QuantizedArray):
        return array, None
    return array.values, einops.rearrange(array.scales, "b s k 1 -> b k 1 1 s")
