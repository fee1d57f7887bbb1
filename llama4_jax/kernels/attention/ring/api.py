"""Ring attention as a function of whole arrays, with the signature of every other implementation of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llama4_jax.kernels.attention import blockwise, spread
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.kernels.attention.ring import portable, remote

IMPLEMENTATIONS = {"portable": portable.attend, "remote": remote.attend}


def over_mesh(
    mesh: Mesh | AbstractMesh,
    arrays: PartitionSpec,
    *,
    blocking: Blocking | None = None,
    implementation: str = "portable",
) -> Callable[..., jax.Array]:
    """A function like `reference.attend` for queries [b t n h], keys and values [b s k h] spread over `mesh` as `arrays`.

    That names the mesh axes of batch, length, heads and head_dim. The axis of the length is the ring; None, where it is
    whole on each device, needs no ring. Pad lengths with tokens of segment 0 where devices do not divide them.
    Raises ValueError for an axis that is not of the mesh, and for an implementation not in IMPLEMENTATIONS.
    """
    axis = arrays[1]
    spread.check_axis(axis, mesh)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"ring implementation {implementation!r} is unknown; use one of {sorted(IMPLEMENTATIONS)}")
    piece = partial(IMPLEMENTATIONS[implementation], axis_name=axis) if axis else blockwise.attend
    return spread.over_mesh(partial(piece, blocking=blocking), mesh, arrays)
