"""Cutting attention into blocks of queries and keys, and finding the pairs of blocks that the mask leaves anything in.

A pair is judged by the ranges of its live tokens' positions, segments and chunks, so the table costs one look at each
token and is never wrong to skip; it may keep a pair that shows nothing, as when a block holds the end of one document
and the start of another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.core import partitioning
from llama4_jax.kernels.attention import mask

Carry = TypeVar("Carry")

# Measured on two CPU cores: a tile of scores should stay in the second-level cache (1 MB of float32 at most), and
# beyond 128 the gradient slows down while the forward pass gains nothing.
TILE_SCORES = 2**18
LARGEST, SMALLEST = 128, 32
LARGEST_KEYS = 1024  # for the few queries of a decoding step
# Elsewhere tiles lie in HBM whatever their size, and matrix units want large products; 64 MiB of scores. Not measured.
ACCELERATOR_TILE_SCORES, ACCELERATOR_LARGEST = 2**24, 512


class Tokens(NamedTuple):
    """Where tokens stand: positions in their documents and the documents' numbers (0 is padding), both int [b t]."""

    positions: jax.Array
    segments: jax.Array


class Extent(NamedTuple):
    """Ranges of the live tokens of blocks, each int [blocks b]; where none is live, low positions exceed high ones."""

    low: Tokens
    high: Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocking:
    """How lengths are cut: block sizes in tokens (the last block is filled up with padding), and the layer's chunk."""

    queries: int
    keys: int
    chunk_size: int | None


def choose(rows: int, query_length: int, key_length: int, chunk_size: int | None) -> Blocking:
    """Block sizes that keep one tile of scores in a CPU's cache, or make an accelerator's products large.

    Args:
        rows: score matrices computed together, batch times query heads.
        query_length, key_length: t and s.
        chunk_size: positions in a chunk, or None.
    """
    on_cpu = partitioning.platform() == "cpu"
    tile, largest = (TILE_SCORES, LARGEST) if on_cpu else (ACCELERATOR_TILE_SCORES, ACCELERATOR_LARGEST)
    size = min(_power_below(math.sqrt(tile / rows)), largest)
    # Nor do they outgrow the chunk.
    limit = LARGEST_KEYS if chunk_size is None else min(LARGEST_KEYS, 2 ** math.ceil(math.log2(chunk_size)))
    size = max(min(size, limit), SMALLEST)
    queries = _even(query_length, size)
    if query_length < size:
        size = max(size, min(_power_below(tile / (rows * queries)), limit))
    return Blocking(queries=queries, keys=_even(key_length, size), chunk_size=chunk_size)


def _power_below(number: float) -> int:
    """The largest power of two that is at most `number`; 1 for numbers below 1."""
    return 2 ** max(0, math.floor(math.log2(number)))


def _even(length: int, size: int) -> int:
    """`size` where it cuts `length` into many blocks; else what cuts it into as few blocks with the least filling."""
    blocks = math.ceil(length / size)
    if blocks > 2:
        return size
    return 8 * math.ceil(length / blocks / 8) if length >= 8 else length


def visited(queries: Tokens, keys: Tokens, blocking: Blocking) -> jax.Array:
    """The pairs of blocks that blockwise attention computes; bool [query blocks, key blocks].

    Never false where `mask.visible` is true anywhere in the pair, in any row of the batch.
    """
    queries, keys = cut_tokens(queries, blocking.queries), cut_tokens(keys, blocking.keys)
    return jax.vmap(lambda block: _meets(extent(block), extent(keys), blocking.chunk_size))(queries)


def extent(tokens: Tokens) -> Extent:
    """Ranges over the last axis, of live tokens only."""
    live = (tokens.segments != 0) & (tokens.positions >= 0)
    return Extent(
        low=Tokens(*(jnp.where(live, x, jnp.iinfo(x.dtype).max).min(-1) for x in tokens)),
        high=Tokens(*(jnp.where(live, x, -1).max(-1) for x in tokens)),
    )


def _meets(query: Extent, keys: Extent, chunk_size: int | None) -> jax.Array:
    """Which key blocks ([key blocks, b]) one query block ([b]) may see; bool [key blocks]."""
    rule = (query.low.positions <= query.high.positions) & (keys.low.positions <= query.high.positions)
    rule &= (query.low.segments <= keys.high.segments) & (keys.low.segments <= query.high.segments)
    if chunk_size is not None:
        rule &= query.low.positions // chunk_size <= keys.high.positions // chunk_size
        rule &= keys.low.positions // chunk_size <= query.high.positions // chunk_size
    return rule.any(-1)


def fold_visible(
    step: Callable[[Carry, jax.Array, jax.Array], Carry],
    carry: Carry,
    queries: Tokens,
    keys: Tokens,
    key_extent: Extent,
    chunk_size: int | None,
) -> Carry:
    """Folds `step(carry, index, rule)` over the key blocks that one block of queries may see; the rest cost nothing.

    Args:
        step: given the key block's index and `mask.visible` of the pair, bool [b 1 1 t s], returns the new carry.
        queries: [b t], of one block.
        keys: [key blocks b s], with `key_extent` [key blocks b].
    """
    listed = _meets(extent(queries), key_extent, chunk_size)  # [key blocks]
    order = jnp.argsort(~listed, stable=True)  # those to visit come first, in order

    def visit(i, carry):
        index = order[i]
        block = Tokens(*(lax.dynamic_index_in_dim(x, index, keepdims=False) for x in keys))
        rule = mask.visible(queries.positions, block.positions, queries.segments, block.segments, chunk_size)
        return step(carry, index, rule[:, None, None])

    return lax.fori_loop(0, listed.sum(dtype=jnp.int32), visit, carry)


def pad(array: jax.Array, size: int) -> jax.Array:
    """[b t ...] filled up with zeros to a whole number of blocks; zero segments make the filling invisible."""
    widths = [(0, 0), (0, -array.shape[1] % size), *[(0, 0)] * (array.ndim - 2)]
    return jnp.pad(array, widths)


def cut_tokens(tokens: Tokens, size: int) -> Tokens:
    """[b t] -> [blocks b size]."""
    return Tokens(*(pad(x, size).reshape(x.shape[0], -1, size).swapaxes(0, 1) for x in tokens))


def take(array: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Block `index` of a padded array; [b s ...] -> [b size ...]."""
    return lax.dynamic_slice_in_dim(array, index * size, size, axis=1)


def add(array: jax.Array, index: jax.Array, block: jax.Array) -> jax.Array:
    """Adds to block `index` of a padded array. Not `.at[].add`, a scatter: XLA writes this slice in place."""
    size = block.shape[1]
    return lax.dynamic_update_slice_in_dim(array, take(array, index, size) + block, index * size, axis=1)
