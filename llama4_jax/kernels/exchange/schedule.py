"""Which rows of which device go where, in rounds of a bounded number of rows: the offsets of a ragged exchange.

Plain arithmetic on counts that every device knows; a test holds it against a loop over single rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Parts:
    """What device i sends of expert e: rows `source[i, e]` .. + `size[i, e]` of its own to `target[i, e]` of the owner's.

    All [p e] int32, for p devices. Invariant: the parts that meet in one device do not overlap.
    """

    source: jax.Array
    size: jax.Array
    target: jax.Array


@struct.dataclass
class Schedule:
    """Where every row goes. counts [p e] int32: rows of device i for expert e, each device's sorted by expert.

    A device receives its experts in order, and of each the rows of device 0, 1, ...; round r takes those that are number
    r * capacity and following.
    """

    counts: jax.Array
    capacity: int = struct.field(pytree_node=False)

    @property
    def rounds(self) -> jax.Array:
        """[] int32: enough for the device that receives most, and none if there is nothing to send."""
        received = owned(jnp.sum(self.counts, axis=0), self.counts.shape[0]).sum(axis=1)
        return -(-jnp.max(received) // self.capacity)

    def parts(self, number: jax.Array) -> Parts:
        """Those of one round, out."""
        devices = self.counts.shape[0]
        place = _before(self.counts, axis=0)  # among the rows of the same expert
        place += _before(owned(jnp.sum(self.counts, axis=0), devices), axis=1).reshape(-1)  # after earlier experts
        low = number * self.capacity
        begin, end = (jnp.clip(x, low, low + self.capacity) for x in (place, place + self.counts))
        sent_before = jnp.clip(low - place, 0, self.counts)
        return Parts(source=_before(self.counts, axis=1) + sent_before, size=end - begin, target=begin - low)


def owned(experts: jax.Array, devices: int) -> jax.Array:
    """Numbers [e] as [p e/p]: device i holds an equal part of the experts, in order."""
    return experts.reshape(devices, -1)


def _before(numbers: jax.Array, axis: int) -> jax.Array:
    """Sums of what comes before each number."""
    return jnp.cumsum(numbers, axis) - numbers
