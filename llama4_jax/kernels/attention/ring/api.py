"""Ring attention as a function of whole arrays, with the signature of every other implementation of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llama4_jax.kernels.attention import blockwise
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.kernels.attention.ring import portable


def over_mesh(
    mesh: Mesh | AbstractMesh, arrays: PartitionSpec, *, blocking: Blocking | None = None
) -> Callable[..., jax.Array]:
    """A function like `reference.attend` for queries [b t n h], keys and values [b s k h] spread over `mesh` as `arrays`.

    That names the mesh axes of batch, length, heads and head_dim. The axis of the length is the ring; None, where it is
    whole on each device, needs no ring. Pad lengths with tokens of segment 0 where devices do not divide them.
    """
    batch, context, *_ = arrays
    if context is not None and context not in mesh.shape:
        raise ValueError(f"the ring's axis {context!r} is no axis of the mesh, which has {', '.join(mesh.shape)}")
    tokens = PartitionSpec(batch, context)
    piece = partial(portable.attend, axis_name=context) if context else blockwise.attend

    def attend(query, key, value, *, query_positions, key_positions, query_segments, key_segments, chunk_size):
        def local(query, key, value, query_positions, key_positions, query_segments, key_segments):
            return piece(
                query,
                key,
                value,
                query_positions=query_positions,
                key_positions=key_positions,
                query_segments=query_segments,
                key_segments=key_segments,
                chunk_size=chunk_size,
                blocking=blocking,
            )

        # Loops inside start from plain zeros, which the check of what varies over the mesh does not allow.
        spread = partial(jax.shard_map, mesh=mesh, check_vma=False)
        call = spread(local, in_specs=(arrays,) * 3 + (tokens,) * 4, out_specs=arrays)
        return call(query, key, value, query_positions, key_positions, query_segments, key_segments)

    return attend
