"""Cross-entropy on a mesh: devices that hold different experts hold different parts of the vocabulary here.

Instead of one output matrix on every device, with a gradient in float32 of its own, each device of an `expert` group has a
part of the columns, and the group's tokens travel to it in pieces of time. Softmax needs three numbers a token from the
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

(GROUP,) = TRAIN.table["experts"]
WIDTH = tuple(TRAIN.table["vocab"])
_BATCH, _TIME = (tuple(TRAIN.table[axis]) for axis in partitioning.BATCH_AXES)
_OTHERS = tuple(axis for axis in (*_BATCH, *_TIME) if axis != GROUP)  # over which sums of tokens are left to be added


def divides(mesh: AbstractMesh, batch: int, time: int, vocabulary: int) -> bool:
    """Whether tokens [batch time] and the vocabulary cut evenly over the mesh."""
    parts = (_size(mesh, _BATCH), _size(mesh, _TIME), _size(mesh, (GROUP, *WIDTH)))
    return not any(size % n for size, n in zip((batch, time, vocabulary), parts))


def ways(mesh: AbstractMesh) -> tuple[int, int, int]:
    """What divides rows, time and vocabulary in a device's logits: its group's rows come together, so do their parts."""
    return _size(mesh, _BATCH), _size(mesh, _TIME), _size(mesh, WIDTH)


def sums(mesh: AbstractMesh, hidden, unembedding, targets, weights, chunk: Callable, over_time: Callable):
    """Weighted sums of loss and nll, and the gradients of the first in hidden [b t d] and unembedding [d v].

    chunk: loss, nll and gradient of the logits for some tokens, a part of the matrix and `_Parts`; over_time: folds it over
    pieces of time.
    """
    tokens, matrix = PartitionSpec(_BATCH, _TIME), PartitionSpec(tuple(TRAIN.table["embed"]), WIDTH)

    def local(hidden, shard, targets, weights):
        part = _columns(shard)  # [d v/n]
        index = lax.axis_index((*WIDTH, GROUP))
        vocabulary = _Parts(index * part.shape[1])

        def add(carry, piece):
            piece = [lax.all_gather(x, GROUP, axis=0, tiled=True) for x in piece]
            total, nll, gradient = chunk(*piece, part, vocabulary)
            gradient = gradient.astype(part.dtype)
            to_hidden = jnp.einsum("btv,dv->btd", gradient, part).astype(hidden.dtype)
            to_hidden = lax.psum_scatter(to_hidden, GROUP, scatter_dimension=0, tiled=True)
            share = jnp.einsum("btd,btv->dv", piece[0], gradient, preferred_element_type=jnp.float32)
            return (carry[0] + total, carry[1] + nll, carry[2] + share), lax.psum(to_hidden, WIDTH)

        zero = jnp.zeros((), jnp.float32)
        start = (zero, zero, jnp.zeros(part.shape, jnp.float32))
        (total, nll, to_matrix), to_hidden = over_time(add, start, (hidden, targets, weights))
        return *lax.psum((total, nll), _OTHERS), to_hidden, _shard(to_matrix.astype(part.dtype))

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

    def __init__(self, first: jax.Array):
        self.first, self._axes = first, (GROUP, *WIDTH)

    def highest(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self._axes)

    def total(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, self._axes)


def _columns(shard: jax.Array) -> jax.Array:
    """From a device's rows of the matrix, [d/m v], its columns, [d v/n]."""
    outer, inner = _around()
    part = lax.all_to_all(spread.joined(shard, inner, 0), GROUP, split_axis=1, concat_axis=0, tiled=True)
    return spread.joined(part, outer, 0)


def _shard(part: jax.Array) -> jax.Array:
    """The reverse for the gradient, added up over tokens: from columns [d v/n] to rows [d/m v]."""
    outer, inner = _around()
    left = tuple(axis for axis in _OTHERS if axis not in (*outer, *inner))
    rows = spread.parted(lax.psum(part, left), outer, 0)
    rows = lax.all_to_all(rows, GROUP, split_axis=0, concat_axis=1, tiled=True)
    return spread.parted(rows, inner, 0)


def _around() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that split rows of the matrix outside and inside of the group."""
    axes = tuple(TRAIN.table["embed"])
    at = axes.index(GROUP)
    return axes[:at], axes[at + 1 :]


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size
