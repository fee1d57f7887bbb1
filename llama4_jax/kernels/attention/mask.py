"""Which keys a query may see: the one rule that prefill, decode, packing, padding and caches all follow.

Source: Llama 4's chunked attention, as in Hugging Face transformers `create_chunked_causal_mask`. Difference from it:
positions are given, not counted from array indices, so chunk borders restart with each packed document and do not move
with left padding or with the place of a token in a cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def visible(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    chunk_size: int | None,
) -> jax.Array:
    """True where a query may see a key; bool [b t s].

    A key is seen when it belongs to the query's segment and that is not padding (0), its position is not before 0 (an
    empty cache slot is -1) nor after the query's, and, in chunked layers, both lie in one block of `chunk_size`
    positions. The blocks are fixed, unlike a sliding window: the first token of a chunk sees itself alone.

    Args:
        query_positions: [b t] int, positions within the query's document, from 0.
        key_positions: [b s] int; -1 marks an empty cache slot.
        query_segments: [b t] int, the document's number within the row, from 1; 0 is padding.
        key_segments: [b s] int.
        chunk_size: positions in a chunk, or None for a layer that sees everything before.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]  # [b t 1], [b 1 s]
    document = query_segments[:, :, None]
    rule = (document == key_segments[:, None, :]) & (document != 0) & (key >= 0) & (key <= query)
    if chunk_size is not None:
        rule &= query // chunk_size == key // chunk_size
    return jnp.asarray(rule)
