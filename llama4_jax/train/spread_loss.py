"""Cross-entropy on a mesh: the devices of a group hold different parts of the vocabulary.

Instead of one output matrix on every device, with a gradient in float32 of its own, each device of a group has a part of the
columns, and the group's tokens travel to it in pieces of time. Softmax needs three numbers a token from the
others: the highest logit, the sum of exponentials, and the logit of the target.

Source: the vocabulary-parallel loss of Shoeybi et al. 2019, "Megatron-LM", section 3; gradients at once as in `losses`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import TRAIN
from llama4_jax.nn import spread

WIDTH = tuple(TRAIN.table["vocab"])
_STORED = tuple(TRAIN.table["embed"])
_BATCH, _TIME = (tuple(TRAIN.table[name]) for name in partitioning.BATCH_AXES)


def _group(mesh: AbstractMesh, vocabulary: int) -> str:
    """The mesh axis whose devices share the vocabulary: of those that divide it the shortest, for hidden states travel."""
    fits = [axis for axis in _STORED if axis in _BATCH and not vocabulary % (_size(mesh, WIDTH) * mesh.shape[axis])]
    return min(fits, key=lambda axis: (mesh.shape[axis] == 1, mesh.shape[axis]), default=_STORED[0])


def _others(group: str) -> tuple[str, ...]:
    """Mesh axes over which sums of tokens are left to be added."""
    return tuple(axis for axis in (*_BATCH, *_TIME) if axis != group)


def divides(mesh: AbstractMesh, batch: int, time: int, vocabulary: int) -> bool:
    """Whether tokens [batch time] and the vocabulary cut evenly over the mesh."""
    parts = (
        *(_size(mesh, axes) for axes in partitioning.batch_axes()),
        _size(mesh, (_group(mesh, vocabulary), *WIDTH)),
    )
    return not any(size % n for size, n in zip((batch, time, vocabulary), parts))


def ways(mesh: AbstractMesh) -> tuple[int, int, int]:
    """What divides rows, time and vocabulary in a device's logits: its group's rows come together, so do their parts."""
    return *(_size(mesh, axes) for axes in partitioning.batch_axes()), _size(mesh, WIDTH)


def sums(mesh: AbstractMesh, hidden, unembedding, targets, weights, chunk: Callable, over_time: Callable):
    """Weighted sums of loss and nll, and the gradients of the first in hidden [b t d] and unembedding [d v].

    chunk: loss, nll and gradient of the logits for some tokens, a part of the matrix and `_Parts`; over_time: folds it over
    pieces of time.
    """
    group = _group(mesh, unembedding.shape[1])
    tokens, matrix = PartitionSpec(*partitioning.batch_axes()), PartitionSpec(_STORED, WIDTH)

    def local(hidden, shard, targets, weights):
        part = _columns(shard, group)  # [d v/n]
        index = lax.axis_index((*WIDTH, group))
        vocabulary = _Parts(index * part.shape[1], (group, *WIDTH))

        def add(carry, piece):
            piece = [lax.all_gather(x, group, axis=0, tiled=True) for x in piece]
            total, nll, gradient = chunk(*piece, part, vocabulary)
            gradient = gradient.astype(part.dtype)
            to_hidden = jnp.einsum("btv,dv->btd", gradient, part).astype(hidden.dtype)
            to_hidden = lax.psum_scatter(to_hidden, group, scatter_dimension=0, tiled=True)
            share = jnp.einsum("btd,btv->dv", piece[0], gradient, preferred_element_type=jnp.float32)
            return (carry[0] + total, carry[1] + nll, carry[2] + share), lax.psum(to_hidden, WIDTH)

        zero = jnp.zeros((), jnp.float32)
        start = (zero, zero, jnp.zeros(part.shape, jnp.float32))
        (total, nll, to_matrix), to_hidden = over_time(add, start, (hidden, targets, weights))
        # Scattered before anything else goes on: else its float32 sum is held all through the layers' backward pass.
        to_hidden, shard = lax.optimization_barrier((to_hidden, _shard(to_matrix.astype(part.dtype), group)))
        return *lax.psum((total, nll), _others(group)), to_hidden, shard

    whole = PartitionSpec()
    call = jax.shard_map(
        local,
        mesh=mesh,
        check_vma=False,
        in_specs=(tokens, matrix, tokens, tokens),
        out_specs=(whole, whole, tokens, matrix),
    )
    return call(hidden, unembedding, targets, weights)


class _Parts:
    """How one device's part of the vocabulary, from column `first`, becomes the whole."""

    def __init__(self, first: jax.Array, axes: tuple[str, ...]):
        self.first, self._axes = first, axes

    def highest(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self._axes)

    def total(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, self._axes)


def _columns(shard: jax.Array, group: str) -> jax.Array:
    """From a device's rows of the matrix, [d/m v], its columns, [d v/n]."""
    outer, inner = _around(group)
    part = lax.all_to_all(spread.joined(shard, inner, 0), group, split_axis=1, concat_axis=0, tiled=True)
    return spread.joined(part, outer, 0)


def _shard(part: jax.Array, group: str) -> jax.Array:
    """The reverse for the gradient, added up over tokens: from columns [d v/n] to rows [d/m v]."""
    outer, inner = _around(group)
    left = tuple(axis for axis in _others(group) if axis not in (*outer, *inner))
    rows = spread.parted(lax.psum(part, left), outer, 0)
    rows = lax.all_to_all(rows, group, split_axis=0, concat_axis=1, tiled=True)
    return spread.parted(rows, inner, 0)


def _around(group: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that split rows of the matrix outside and inside of the group."""
    at = _STORED.index(group)
    return _STORED[:at], _STORED[at + 1 :]


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size
