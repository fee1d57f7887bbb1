"""Rows cut into chunks that are rows themselves, for chunked layers where no chunk crosses a multiple of the chunk size."""

from __future__ import annotations

import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp


def apart(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` with [b t ..] as [b * chunks, chunk_size ..]: half the work of a window, and tables of one chunk.

    attend: as `reference.attend`, for a sequence to itself. Rows are filled up to whole chunks with padding.
    """

    @functools.wraps(attend)
    def by_chunks(query: jax.Array, key: jax.Array, value: jax.Array, *, chunk_size: int, **tokens) -> jax.Array:
        batch, length = query.shape[:2]
        cut = functools.partial(_cut, chunk_size=chunk_size)
        tokens = {name: cut(array) for name, array in tokens.items()}
        out = attend(cut(query), cut(key), cut(value), **tokens, chunk_size=chunk_size)
        return einops.rearrange(out, "(b c) t ... -> b (c t) ...", b=batch)[:, :length]

    return by_chunks


def _cut(array: jax.Array, chunk_size: int) -> jax.Array:
    """[b t ..] -> [b * chunks, chunk_size ..]; zeros fill the last: segment 0, which is padding."""
    filled = jnp.pad(array, [(0, 0), (0, -array.shape[1] % chunk_size)] + [(0, 0)] * (array.ndim - 2))
    return einops.rearrange(filled, "b (c t) ... -> (b c) t ...", t=chunk_size)
