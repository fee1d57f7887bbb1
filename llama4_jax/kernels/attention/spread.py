"""Attention of one device's tokens as a function of whole arrays, with the signature of every other implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def over_mesh(
    piece: Callable[..., jax.Array], mesh: Mesh | AbstractMesh, arrays: PartitionSpec
) -> Callable[..., jax.Array]:
    """A function like `reference.attend` for queries [b t n h], keys and values [b s k h] spread over `mesh` as `arrays`.

    piece: like `reference.attend` for what one device holds; called inside `jax.shard_map`.
    arrays: the mesh axes of batch, length, heads and head_dim.
    """
    tokens = PartitionSpec(*arrays[:2])

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
            )

        # Loops inside start from plain zeros, which the check of what varies over the mesh does not allow.
        spread = partial(jax.shard_map, mesh=mesh, check_vma=False)
        call = spread(local, in_specs=(arrays,) * 3 + (tokens,) * 4, out_specs=arrays)
        return call(query, key, value, query_positions, key_positions, query_segments, key_segments)

    return attend


def check_axis(axis: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError if `axis`, over which a length is spread, is not of the mesh."""
    for name in axis if isinstance(axis, tuple) else (axis,):
        if name is not None and name not in mesh.shape:
            raise ValueError(f"the length's axis {name!r} is no axis of the mesh, which has {', '.join(mesh.shape)}")
