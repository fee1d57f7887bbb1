"""Attention of chunked layers over a sequence spread over devices: keys come from the pieces just before, and no further.

Each device takes the end of the pieces before its own, at most chunk_size - 1 tokens for each piece it holds, and attends
to these and its own keys as if they were one sequence. Where nothing is needed (`layout.exchanges`) nothing is sent: pieces
of whole chunks under aligned documents compile to a program without communication. The gradient goes the same ways back.

Memory is that of a device's own piece and of one chunk, whatever the full length. The mask is `mask.visible`, so that what
was sent in vain (another document's keys, another chunk's) costs bytes and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llama4_jax.kernels.attention import blocks, blockwise, spread
from llama4_jax.kernels.attention.blocks import Blocking, Tokens
from llama4_jax.kernels.attention.layout import Exchange, Layout


def over_mesh(mesh: Mesh | AbstractMesh, arrays: PartitionSpec, layout: Layout) -> Callable[..., jax.Array]:
    """As `ring.over_mesh`, for layers with a chunk size, and rows that lie as `layout` says."""
    axis = arrays[1]
    spread.check_axis(axis, mesh)
    piece = functools.partial(attend, axis_name=axis, layout=layout) if axis else blockwise.attend
    return spread.over_mesh(piece, mesh, arrays)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    chunk_size: int,
    axis_name: str | tuple[str, ...],
    layout: Layout,
) -> jax.Array:
    """As `reference.attend`, for the tokens of one device; call it inside `jax.shard_map` over `axis_name`.

    Args:
        query: [b t n h], this device's pieces, one after the other.
        key, value: [b t k h], of the same tokens.
        query_positions, query_segments, key_positions, key_segments: [b t] int, see `mask.visible`.
        chunk_size: positions in a chunk.
        axis_name: the mesh axis, or axes, over which rows are spread.
        layout: which pieces of the row the devices hold. Tokens of one document must follow each other in the row.
    """
    own = (key, value, key_positions, key_segments)
    piece = key.shape[1] // layout.slots
    with jax.named_scope("exchange"):
        received = [_receive(own, each, piece, axis_name) for each in layout.exchanges(piece, chunk_size)]
    key, value, key_positions, key_segments = (jnp.concatenate(arrays, axis=1) for arrays in zip(own, *received))
    return blockwise.attend(
        query,
        key,
        value,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        chunk_size=chunk_size,
    )


def _receive(own, exchange: Exchange, piece: int, axis_name: str | tuple[str, ...]):
    """The end of another device's piece, [b s ..] for each array; zeros, so segment 0, which no query sees, if of none."""

    def sent(slot: int, pairs):
        end = (slot + 1) * piece
        return lax.ppermute([array[:, end - exchange.tokens : end] for array in own], axis_name, pairs)

    # A device receives from one of them; the others give it zeros.
    return functools.reduce(lambda one, other: list(map(jnp.add, one, other)), (sent(*send) for send in exchange.sends))


def work(positions: jax.Array, segments: jax.Array, layout: Layout, blocking: Blocking) -> np.ndarray:
    """As `ring.work`, of a chunked layer: pairs of query and key blocks that each device computes, int [devices].

    positions, segments: [b t], in their places. Its blocks of keys begin with the device's own tokens.
    """
    own = [np.stack(np.split(np.asarray(x), layout.devices, axis=1)) for x in (positions, segments)]  # [n b t]
    piece, held = own[0].shape[2] // layout.slots, [own]
    for tokens, sends in layout.exchanges(piece, blocking.chunk_size):
        held.append([np.zeros_like(x[..., :tokens]) for x in own])
        for slot, pairs in sends:
            senders, receivers = np.array(pairs).T
            for received, x in zip(held[-1], own):
                received[receivers] = x[senders, :, (slot + 1) * piece - tokens : (slot + 1) * piece]
    keys = Tokens(*(np.concatenate(arrays, axis=-1) for arrays in zip(*held)))
    met = jax.vmap(lambda queries, keys: blocks.visited(queries, keys, blocking).sum())
    return np.asarray(met(Tokens(*own), keys))
