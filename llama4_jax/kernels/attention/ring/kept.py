"""Sums over all panels and hops that live in HBM: a block of them is read while its step computes, and written after.

A step's own sums are put together with what earlier steps left once both are there, so that neither the reading nor the
writing is waited for by the matrix unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Arrays of blocks in HBM, with room in VMEM for one block as it was and one as it will be.

    At most one block is being written; `writing` in SMEM says whether, and every step must call `update` or `settle`.
    """

    arrays: Sequence  # [heads blocks ...] in HBM
    before: Sequence  # one block, in VMEM
    after: Sequence
    read: jax.Array  # semaphores, one for each array
    written: jax.Array
    writing: jax.Array  # [1] in SMEM

    @staticmethod
    def scratch(shapes: Sequence[tuple[int, ...]]) -> dict:
        """What a kernel must allocate for float32 blocks of these shapes, under the names of the fields."""
        room = [pltpu.VMEM(shape, jnp.float32) for shape in shapes]
        semaphores = pltpu.SemaphoreType.DMA((len(shapes),))
        return {
            "before": room,
            "after": list(room),
            "read": semaphores,
            "written": semaphores,
            "writing": pltpu.SMEM((1,), jnp.int32),
        }

    def reset(self) -> None:
        self._note_writing(0)

    def _note_writing(self, count: int) -> None:
        writing = self.writing
        writing[0] = count

    def settle(self) -> None:
        """Waits until what was last written is there."""

        @pl.when(self.writing[0] == 1)
        def _():
            for copy in self._copies(self.after, self.written, 0, 0, out=True):
                copy.wait()
            self._note_writing(0)

    def update(self, head, block, new, compute: Callable[[], Sequence], merge: Callable[..., Sequence]) -> None:
        """Writes `compute()` to a block, or what `merge` makes of it and of what was there, unless the block is `new`."""
        if self.arrays[0].shape[1] == 1:
            self.settle()  # what is read may be what was written just now

        @pl.when(~new)
        def _():
            for copy in self._copies(self.before, self.read, head, block, out=False):
                copy.start()

        part = compute()
        self.settle()

        @pl.when(new)
        def _():
            self._put(part)

        @pl.when(~new)
        def _():
            for copy in self._copies(self.before, self.read, head, block, out=False):
                copy.wait()
            self._put(merge(part, [room[...] for room in self.before]))

        for copy in self._copies(self.after, self.written, head, block, out=True):
            copy.start()
        self._note_writing(1)

    def _put(self, values: Sequence) -> None:
        for room, value in zip(self.after, values, strict=True):
            room[...] = value

    def _copies(self, rooms: Sequence, semaphores, head, block, *, out: bool):
        pairs = [(room, array.at[head, block]) for room, array in zip(rooms, self.arrays, strict=True)]
        return [pltpu.make_async_copy(*(pair if out else pair[::-1]), semaphores.at[i]) for i, pair in enumerate(pairs)]
