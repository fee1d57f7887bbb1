"""Ring attention as a function of whole arrays, with the signature of every other implementation of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.sharding import Mesh, PartitionSpec

from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.kernels.attention.ring import portable


def over_mesh(
    mesh: Mesh,
    *,
    context: str,
    batch: Sequence[str] = (),
    heads: str | None = None,
    blocking: Blocking | None = None,
) -> Callable[..., jax.Array]:
    """A function like `reference.attend` for arrays that are spread over `mesh`.

    Lengths are cut over the mesh axis `context`, the batch over `batch`, and heads, those of keys too, over `heads`. Every
    size must be divisible by the devices that share it; pad lengths with tokens of segment 0.
    """
    if context not in mesh.shape:
        raise ValueError(f"context={context!r} is no axis of the mesh, which has {', '.join(mesh.shape)}")
    tokens = PartitionSpec(tuple(batch) or None, context)
    arrays = PartitionSpec(*tokens, heads, None)

    def attend(query, key, value, *, query_positions, key_positions, query_segments, key_segments, chunk_size):
        def local(query, key, value, query_positions, key_positions, query_segments, key_segments):
            return portable.attend(
                query,
                key,
                value,
                query_positions=query_positions,
                key_positions=key_positions,
                query_segments=query_segments,
                key_segments=key_segments,
                chunk_size=chunk_size,
                axis_name=context,
                blocking=blocking,
            )

        # Loops inside start from plain zeros, which the check of what varies over the mesh does not allow.
        spread = partial(jax.shard_map, mesh=mesh, check_vma=False)
        call = spread(local, in_specs=(arrays,) * 3 + (tokens,) * 4, out_specs=arrays)
        return call(query, key, value, query_positions, key_positions, query_segments, key_segments)

    return attend
