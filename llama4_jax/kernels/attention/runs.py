"""Runs: the tokens of a row that may see each other, numbered, for kernels that know segments and places and no positions.

Where tokens of a document follow each other in the row, in the order of their positions, `mask.visible` of a sequence with
itself says no more than this: a token sees those of its run up to its own place. A run is a document or, in a chunked
layer, one chunk of it; chunks restart with each document, and so do runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def number(positions: jax.Array, segments: jax.Array, chunk_size: int | None) -> jax.Array:
    """The run of each token, from 1 in order; 0 for padding, which no token may see; int32 [b t].

    Args:
        positions: [b t] int, from 0 in each document; negative where there is no token.
        segments: [b t] int, the document of each token; 0 where there is no token.
        chunk_size: positions in a chunk, or None.
    """
    starts = differs(segments)
    if chunk_size is not None:
        starts |= differs(positions // chunk_size)
    live = (segments != 0) & (positions >= 0)
    return jnp.where(live, 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)


def differs(tokens: jax.Array) -> jax.Array:
    """Where a token differs from the one before it; bool [b t]."""
    return jnp.pad(tokens[:, 1:] != tokens[:, :-1], ((0, 0), (1, 0)))
