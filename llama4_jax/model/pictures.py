"""Pictures on a mesh: each device looks at its share of them, and features travel to the placeholders, wherever those are.

Pictures come split over the devices that split rows (`train.shards`); those that share a row share its pictures out among
themselves. A device's features are one run of the batch's, in order of appearance, and what it needs is one run for
each piece of a row that it holds. So every device knows from the numbers of placeholders which rows of features it sends
where, and they travel in one ragged exchange, each once; gradients come back the same way.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import TRAIN
from llama4_jax.kernels.attention import Layout
from llama4_jax.kernels.exchange import ragged_all_to_all
from llama4_jax.model import fusion

_ROWS, _TIME = (tuple(TRAIN.table[name]) for name in partitioning.BATCH_AXES)
DEVICES = (*_ROWS, *_TIME)  # they share the pictures, in this order
DEALT = PartitionSpec(DEVICES, None)  # of pictures [n ..] and what becomes of them


def deal(mesh: AbstractMesh, images: jax.Array) -> jax.Array:
    """images [n h w c] dealt out as `DEALT`, as many to each device, filled up with zeros: see `_Share`."""
    share = _Share.of(mesh, images.shape[0])
    images = jnp.pad(images, [(0, share.by_rows * _size(mesh, _ROWS) - images.shape[0])] + [(0, 0)] * 3)

    def local(images):
        filled = jnp.pad(images, [(0, share.each * _size(mesh, _TIME) - share.by_rows)] + [(0, 0)] * 3)
        return lax.dynamic_slice_in_dim(filled, lax.axis_index(_TIME) * share.each, share.each)

    return jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(_ROWS), out_specs=DEALT, check_vma=False)(images)


def deliver(
    mesh: AbstractMesh, embeddings: jax.Array, features: jax.Array, placeholders: jax.Array, pictures: int
) -> jax.Array:
    """As `fusion.fuse` for features [.. p d] of pictures that were `deal`t, and rows spread as the placement in use says.

    pictures: how many there were before. Raises ValueError as `fusion.fuse`, and where rows or time cannot be divided.
    """
    if not isinstance(placeholders, jax.core.Tracer):
        fusion.check(int(np.sum(np.asarray(placeholders))), pictures * features.shape[1])
    tokens = partitioning.spec(partitioning.BATCH_AXES, placeholders.shape, partitioning.placement_in_use(), mesh)
    trip = _Trip(mesh, tokens, _Share.of(mesh, pictures), features.shape[1], Layout.in_use())
    return _deliver(trip, embeddings, features.astype(embeddings.dtype), placeholders)


@dataclasses.dataclass(frozen=True)
class _Share:
    """Of `by_rows` pictures of the devices that share rows, each has `each`, the last perhaps fewer or none."""

    by_rows: int
    each: int

    @classmethod
    def of(cls, mesh: AbstractMesh, pictures: int) -> _Share:
        by_rows = -(-pictures // _size(mesh, _ROWS))
        return cls(by_rows, -(-by_rows // _size(mesh, _TIME)))

    def bounds(self, mesh: AbstractMesh) -> np.ndarray:
        """The first picture of each device and the one after its last, [2 devices]."""
        rows, time = np.divmod(np.arange(_size(mesh, DEVICES)), _size(mesh, _TIME))
        held = np.minimum(np.stack([time, time + 1]) * self.each, self.by_rows)
        return rows * self.by_rows + held


class _Parts(NamedTuple):
    """Rows `source` .. + `size` of one device's features go to `target` .. of what another receives; [devices pieces]."""

    source: jax.Array
    size: jax.Array
    target: jax.Array


@dataclasses.dataclass(frozen=True)
class _Trip:
    """What is known when features' trip is traced. tokens: how [b t] is spread; per_picture: features of a picture."""

    mesh: AbstractMesh
    tokens: PartitionSpec
    share: _Share
    per_picture: int
    layout: Layout

    def spread(self, function, in_specs, out_specs):
        # Buffers start from plain zeros, which the check of what varies over the mesh does not allow.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def capacity(self, placeholders: jax.Array) -> int:
        """The most features that a device can need."""
        return min(placeholders.size, _size(self.mesh, DEVICES) * self.share.each * self.per_picture)

    def parts(self, placeholders: jax.Array) -> tuple[_Parts, _Parts]:
        """What this device sends to each, and what it receives from each; placeholders [b t] are its own."""
        counts = einops.reduce(placeholders.astype(jnp.int32), "b (s t) -> b s", "sum", s=self.layout.slots)
        wanted = jnp.stack([self._before(counts), counts]).reshape(2, -1)  # first feature and number, [2 pieces]
        begin, end = (self.share.bounds(self.mesh) * self.per_picture).astype(np.int32)  # [devices]
        me, others = lax.axis_index(DEVICES), lax.all_gather(wanted, DEVICES)  # [devices 2 pieces]
        sent = _parts(jnp.asarray(begin)[me], jnp.asarray(end)[me], others[:, 0], others[:, 1])
        return sent, _parts(begin[:, None], end[:, None], *wanted)

    def _before(self, counts: jax.Array) -> jax.Array:
        """Placeholders of the batch that come before each of this device's pieces, which have counts [b s]."""
        batch, time = partitioning.batch_axes()
        every = _gathered(_gathered(counts, time, 1), batch, 0)  # [all rows, all pieces as devices hold them]
        in_order = self.layout.row(every).reshape(-1)
        before = self.layout.place((jnp.cumsum(in_order) - in_order).reshape(every.shape))
        corner = [_index(axes) * size for axes, size in zip((batch, time), counts.shape)]
        return lax.dynamic_slice(before, corner, counts.shape)


def _parts(begin, end, first: jax.Array, number: jax.Array) -> _Parts:
    """From a holder of features `begin` .. `end` to one that wants `number` from `first` on for each piece, [.. pieces]."""
    low, high = jnp.maximum(begin, first), jnp.minimum(end, first + number)
    size = jnp.maximum(high - low, 0)
    received_before = jnp.cumsum(number, axis=-1) - number
    source, target = low - begin, low - first + received_before
    return _Parts(*(jnp.where(size > 0, x, 0) for x in jnp.broadcast_arrays(source, size, target)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _deliver(trip: _Trip, embeddings, features, placeholders):
    return _forward(trip, embeddings, features, placeholders)[0]


def _forward(trip: _Trip, embeddings, features, placeholders):
    def local(embeddings, features, placeholders):
        sent, received = trip.parts(placeholders)
        rows = einops.rearrange(features, "n p d -> (n p) d")
        buffer = jnp.zeros((trip.capacity(placeholders), rows.shape[1]), rows.dtype)
        rows = _exchange(rows, buffer, sent.source, sent.size, sent.target, received.size)
        number = jnp.cumsum(placeholders.reshape(-1)).reshape(placeholders.shape) - 1  # among the device's own
        chosen = rows[jnp.clip(number, 0, rows.shape[0] - 1)]  # [b t d]
        return jnp.where(placeholders[..., None], chosen, embeddings)

    out = trip.spread(local, (trip.tokens, DEALT, trip.tokens), trip.tokens)(embeddings, features, placeholders)
    return out, (placeholders, features.shape)


def _backward(trip: _Trip, saved, gradient):
    placeholders, shape = saved

    def local(placeholders, gradient):
        sent, received = trip.parts(placeholders)
        (places,) = jnp.nonzero(placeholders.reshape(-1), size=trip.capacity(placeholders), fill_value=0)
        rows = einops.rearrange(gradient, "b t d -> (b t) d")[places]
        buffer = jnp.zeros((trip.share.each * trip.per_picture, rows.shape[1]), rows.dtype)
        rows = _exchange(rows, buffer, received.target, received.size, received.source, sent.size)
        to_features = rows.reshape(trip.share.each, trip.per_picture, -1)
        return jnp.where(placeholders[..., None], 0, gradient), to_features

    to_embeddings, to_features = trip.spread(local, (trip.tokens, trip.tokens), (trip.tokens, DEALT))(
        placeholders, gradient
    )
    return to_embeddings, to_features, None


_deliver.defvjp(_forward, _backward)


def _exchange(rows, buffer, *numbers):
    with jax.named_scope("exchange"):
        return ragged_all_to_all(rows, buffer, *(x.reshape(-1) for x in numbers), axis_name=DEVICES)


def _gathered(array: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    return lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array


def _index(axes: tuple[str, ...]) -> jax.Array | int:
    return lax.axis_index(axes) if axes else 0


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
