"""What the kernels of a remote ring do besides arithmetic: pieces pass from neighbour to neighbour, panels come into VMEM.

Every device holds two slots for a piece of keys, values and their tokens. While it computes with the one, its DMA engine
writes that piece into the other slot of the device after it, and the device before writes the next piece into its own.
Three signals keep this right whatever the devices' speeds:

* the barrier at the start: the device after has entered the kernel, so that its memory is the kernel's;
* the arrival that a DMA signals when a piece is there;
* the credit: the device after has finished with a slot, so that it may be written again. Without it a fast device would
  write over keys that a slow neighbour is still reading.

Source: the distributed kernels of JAX's Pallas guide (double buffering with a capacity semaphore). Difference: a device
hears only from the one after it, so a barrier counts to one and two calls in a row cannot take each other's signals.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama4_jax.kernels.attention.ring.pieces import Cut, key_extent, meet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """The mesh axis that pieces travel along, and how many devices it has.

    `credits` may be false in the test that shows the race which they prevent, and nowhere else.
    """

    axis_name: str
    size: int
    credits: bool = True

    def neighbour(self, distance: int) -> dict[str, jax.Array]:
        """The device that many places further; its places on other axes of the mesh are this device's."""
        return {self.axis_name: lax.rem(lax.axis_index(self.axis_name) + self.size + distance, self.size)}

    def to_next(self, source, target, sent, arrived):
        """A copy from here to the device after; `arrived` counts there, and here for the copy from the device before."""
        return pltpu.make_async_remote_copy(source, target, sent, arrived, device_id=self.neighbour(1))

    def enter(self) -> None:
        """Tells the device before that it may write here, and waits for the device after to say so."""
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_signal(barrier, 1, device_id=self.neighbour(-1))
        pl.semaphore_wait(barrier, 1)

    def give_credit(self, credit) -> None:
        if self.credits:
            pl.semaphore_signal(credit, 1, device_id=self.neighbour(-1))

    def take_credit(self, credit) -> None:
        if self.credits:
            pl.semaphore_wait(credit, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passing:
    """Keys, values and key tokens on their way round, as seen by one device.

    Panels of them are copied to VMEM one ahead of their use. `sending_hops` is in how many hops, from the first, the kernel
    sends anything: credits are taken and given for those.
    """

    ring: Ring
    cut: Cut
    sending_hops: int
    own: Sequence  # [panels ...] in HBM: this device's piece
    slots: Sequence  # [2 panels ...] in HBM: of hop i in slot i % 2
    panels: Sequence  # [2 ...] in VMEM: of step i in place i % 2
    extents: jax.Array  # [key blocks 4] in SMEM, of the panel in use
    copied: jax.Array  # semaphores: of the copies to VMEM [2 arrays], of those sent [arrays], of those arrived [arrays]
    sent: jax.Array
    arrived: jax.Array
    credit: jax.Array

    @staticmethod
    def scratch(cut: Cut, dtype) -> dict:
        """What a kernel must allocate, under the names of the fields."""
        keys = pltpu.VMEM((2, *cut.panel, cut.head_dim), dtype)
        tokens = pltpu.VMEM((2, *cut.panel_tokens), jnp.int32)
        semaphore = pltpu.SemaphoreType
        return {
            "panels": [keys, keys, tokens],
            "extents": pltpu.SMEM((cut.panel_blocks, 4), jnp.int32),
            "copied": semaphore.DMA((2, 3)),
            "sent": semaphore.DMA((3,)),
            "arrived": semaphore.DMA((3,)),
            "credit": semaphore.REGULAR,
        }

    def start_hop(self, hop) -> None:
        """Sends the piece in use to the device after, while it is computed with here, and begins with its first panel."""

        @pl.when(hop == 0)
        def _():
            copies = [
                pltpu.make_async_copy(own, slot.at[0], self.copied.at[0, i])
                for i, (own, slot) in enumerate(zip(self.own, self.slots))
            ]
            for copy in copies:
                copy.start()
            self.ring.enter()
            for copy in copies:
                copy.wait()

        @pl.when((hop > 0) & (hop < self.sending_hops))
        def _():
            self.ring.take_credit(self.credit)

        @pl.when(hop < self.ring.size - 1)
        def _():
            for copy in self._to_next(hop):
                copy.start()

        self._start(hop, 0)

    def use_panel(self, hop, step) -> None:
        """Waits until a panel is in VMEM and notes what it holds; the panel after it is sent for."""
        for copy in self._to_vmem(hop, step):
            copy.wait()
        tokens, extents = self.panels[2], self.extents

        def note(block, _):
            for i, bound in enumerate(key_extent(tokens[lax.rem(step, 2), block])):
                extents[block, i] = bound
            return 0

        lax.fori_loop(0, self.cut.panel_blocks, note, 0)

        @pl.when(step + 1 < self.cut.steps)
        def _():
            self._start(hop, step + 1)

    def sees(self, queries: tuple[jax.Array, ...]) -> jax.Array:
        """Whether a block of queries, given its extent, may see anything in the panel in use."""
        return functools.reduce(operator.or_, (self._meets(queries, i) for i in range(self.cut.panel_blocks)))

    def visit(self, queries: tuple[jax.Array, ...], step: Callable[[jax.Array], None]) -> None:
        """`step(index)` for the blocks of the panel in use that queries may see; the rest cost nothing."""

        def one(index, _):
            pl.when(self._meets(queries, index))(lambda: step(index))
            return 0

        lax.fori_loop(0, self.cut.panel_blocks, one, 0)

    def _meets(self, queries: tuple[jax.Array, ...], index) -> jax.Array:
        return meet(queries, tuple(self.extents[index, i] for i in range(4)))

    def end_hop(self, hop) -> None:
        """The next piece has arrived and this one is no longer needed here."""

        @pl.when(hop < self.ring.size - 1)
        def _():
            for copy in self._to_next(hop):
                copy.wait_send()
                copy.wait_recv()

        @pl.when(hop < self.sending_hops - 1)
        def _():
            self.ring.give_credit(self.credit)

    def _start(self, hop, step) -> None:
        for copy in self._to_vmem(hop, step):
            copy.start()

    def _to_vmem(self, hop, step):
        cut, place = self.cut, lax.rem(step, 2)
        row = step // (cut.kv_heads * cut.panels) * cut.panels + lax.rem(step, cut.panels)
        return [
            pltpu.make_async_copy(slot.at[lax.rem(hop, 2), index], panel.at[place], self.copied.at[place, i])
            for i, (slot, panel, index) in enumerate(zip(self.slots, self.panels, (step, step, row)))
        ]

    def _to_next(self, hop):
        return [
            self.ring.to_next(
                slot.at[lax.rem(hop, 2)], slot.at[lax.rem(hop + 1, 2)], self.sent.at[i], self.arrived.at[i]
            )
            for i, slot in enumerate(self.slots)
        ]
