"""Attention of a sequence to itself by cuDNN on GPUs, for rows that are one document each, from their first token on.

cuDNN takes no numbers of segments, so packed and padded rows are not for it: `triton` does those. Rows longer than a chunk
are cut into chunks before (`chunks.apart`), after which the causal mask is the whole rule. Under rematerialisation the
forward pass is always computed again: cuDNN's log-sum-exp has no name by which to keep it.

Source: jax.nn.dot_product_attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST_HEAD = 128  # 256 on Hopper and later


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
    implementation: str = "cudnn",
) -> jax.Array:
    """As `reference.attend` of a sequence to itself, each row one document; [b t n h].

    Args:
        query: [b t n h], t at most the chunk size.
        key, value: [b t k h], of the same tokens, where k divides n.
        query_positions, query_segments, key_positions, key_segments: [b t] int, taken to be those of one document, or of one
            chunk; of filling behind it outputs are not zero.
        chunk_size: positions in a chunk, or None.
        implementation: of `jax.nn.dot_product_attention`; "xla" is the same without a GPU, and holds all scores.

    Raises NotImplementedError for rows longer than a chunk, and for what `refusal` names.
    """
    del query_positions, key_positions, query_segments, key_segments
    reason = refusal(query.shape, key.shape, query.dtype) if implementation == "cudnn" else None
    if reason:
        raise NotImplementedError(f"cuDNN does not do {reason}; use triton or blockwise")
    if chunk_size is not None and query.shape[1] > chunk_size:
        raise NotImplementedError(
            f"rows of {query.shape[1]} tokens in chunks of {chunk_size}; cut them with chunks.apart"
        )
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)


def refusal(query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype) -> str | None:
    """What of a call cuDNN cannot do, in words, or None."""
    if query_shape[1] != key_shape[1]:
        return f"{query_shape[1]} queries to {key_shape[1]} keys, only a sequence to itself"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{dtype}, only bfloat16 and float16"
    if query_shape[3] > LARGEST_HEAD or query_shape[3] % 8:
        return f"head_dim={query_shape[3]}, only multiples of 8 up to {LARGEST_HEAD}"
    return None
