"""The backward kernel of a remote ring: keys and values go round again, and the gradients that they gather follow them.

A hop's weights are computed again from the log-sum-exp that the forward pass left. Gradients of queries stay, as sums in
HBM. Those of a panel of keys and values are summed in VMEM over all blocks of queries; then what earlier devices gave to
the panel, which arrived during the hop, is added, and it goes on to the next device, which needs it one hop later, when
it has done the same panel. After the last hop that is home.

Source: Dao et al., "FlashAttention" (2022), appendix B; the second ring as in `portable`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama4_jax.kernels.attention.ring import pieces
from llama4_jax.kernels.attention.ring.kept import Kept
from llama4_jax.kernels.attention.ring.passing import Passing, Ring
from llama4_jax.kernels.attention.ring.pieces import Cut
from llama4_jax.kernels.attention.ring.remote_forward import parameters

BARRIER = 18
GROUPS = 4  # of panels that are waited for together: a chip has but 512 semaphores


def backward(ring: Ring, cut: Cut, queries, keys) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query [heads blocks rows h], key and value [panels blocks s h], in float32.

    Args:
        queries: query_tokens, query, cotangent, and statistics [heads blocks 2 rows]: the log-sum-exp, +inf where nothing
            is seen, and the mean of cotangent . value under the row's weights. Cut by `cut`.
        keys: key, value and key_tokens, cut by `cut`.
    """
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    query_tokens, query, _, statistics = queries
    rows = cut.kv_heads * cut.panels
    panel = (*cut.panel, cut.head_dim)

    def by_head(array):
        return pl.BlockSpec((1, 1, *array.shape[2:]), lambda hop, step, block: (step // cut.panels, block, 0, 0))

    outputs = [pltpu.HBM(query.shape, jnp.float32), *[pltpu.HBM((2, cut.steps, *panel), jnp.float32)] * 2]
    outputs += [pltpu.HBM((2, *x.shape), x.dtype) for x in keys]  # the slots of what passes
    query_grad, key_grad, value_grad, *_ = pl.pallas_call(
        partial(_kernel, ring, cut),
        grid=(ring.size, cut.steps, cut.query_blocks),
        in_specs=[
            pl.BlockSpec((1, 1, *query_tokens.shape[2:]), lambda hop, step, block: (step // rows, block, 0, 0)),
            *[by_head(query)] * 2,
            by_head(statistics),
            *[in_hbm] * 3,
        ],
        out_specs=[in_hbm] * len(outputs),
        out_shape=outputs,
        scratch_shapes={
            "passing": Passing.scratch(cut, query.dtype),
            "following": Following.scratch(cut),
            "kept": Kept.scratch([(cut.rows, cut.head_dim)]),
            "query_sum": pltpu.VMEM((cut.rows, cut.head_dim), jnp.float32),
        },
        compiler_params=parameters(BARRIER),
        name="ring_attention_backward",
    )(*queries, *keys)
    home = ring.size % 2
    return query_grad, key_grad[home], value_grad[home]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Following:
    """Gradients of keys and values, which follow their panels from device to device one hop behind.

    Sent from VMEM straight to the next device's slot of the next hop. `Passing` takes the credits for those slots.
    """

    ring: Ring
    cut: Cut
    slots: Sequence  # [2 panels ...] in HBM: what arrives for hop i, in slot i % 2
    sums: Sequence  # [2 ...] in VMEM: those of every other panel
    earlier: Sequence  # [...] in VMEM: what arrived
    read: jax.Array  # semaphores: [arrays]; of what was sent from each sum [2 arrays]; [2 groups arrays]
    sent: jax.Array
    arrived: jax.Array

    @property
    def group(self) -> int:
        """Panels of a group, which arrive on one semaphore."""
        return math.ceil(self.cut.steps / GROUPS)

    @staticmethod
    def scratch(cut: Cut) -> dict:
        """What a kernel must allocate, under the names of the fields."""
        panel = (*cut.panel, cut.head_dim)
        semaphores = pltpu.SemaphoreType.DMA
        return {
            "sums": [pltpu.VMEM((2, *panel), jnp.float32)] * 2,
            "earlier": [pltpu.VMEM(panel, jnp.float32)] * 2,
            "read": semaphores((2,)),
            "sent": semaphores((2, 2)),
            "arrived": semaphores((2, GROUPS, 2)),
        }

    def start_panel(self, hop, step) -> None:
        """Zeros, once what was there before has been sent."""
        count = hop * self.cut.steps + step

        @pl.when(count >= 2)
        def _():
            for copy in self._to_next(hop, step):  # as many bytes as those
                copy.wait_send()

        for total in self.sums:
            total[lax.rem(count, 2)] = jnp.zeros(total.shape[1:])

    def end_panel(self, hop, step) -> None:
        """Adds what earlier devices gave and sends the sum on."""
        place = lax.rem(hop * self.cut.steps + step, 2)

        @pl.when((hop > 0) & (lax.rem(step, self.group) == 0))
        def _():
            # For the whole group: copies need not arrive in the order in which they were sent.
            self._wait_arrivals(hop, step, jnp.minimum(step + self.group, self.cut.steps))

        @pl.when(hop > 0)
        def _():
            slot = lax.rem(hop, 2)
            copies = [
                pltpu.make_async_copy(array.at[slot, step], room, self.read.at[i])
                for i, (array, room) in enumerate(zip(self.slots, self.earlier))
            ]
            for copy in copies:
                copy.start()
            for copy, total, room in zip(copies, self.sums, self.earlier):
                copy.wait()
                total[place] += room[...]

        for copy in self._to_next(hop, step):
            copy.start()

    def finish(self) -> None:
        """Waits until all that was sent has left, and until this device's own gradients are home."""
        count = self.ring.size * self.cut.steps
        for back in range(min(2, count)):
            hop, step = divmod(count - 1 - back, self.cut.steps)
            for copy in self._to_next(hop, step):
                copy.wait_send()
        self._wait_arrivals(self.ring.size, 0, self.cut.steps)

    def _wait_arrivals(self, hop, start, end) -> None:
        def one(step, _):
            for copy in self._to_next(hop - 1, step):  # the device before sent one like it
                copy.wait_recv()
            return 0

        lax.fori_loop(start, end, one, 0)

    def _to_next(self, hop, step):
        place, slot = lax.rem(hop * self.cut.steps + step, 2), lax.rem(hop + 1, 2)
        return [
            self.ring.to_next(
                total.at[place],
                array.at[slot, step],
                self.sent.at[place, i],
                self.arrived.at[slot, step // self.group, i],
            )
            for i, (total, array) in enumerate(zip(self.sums, self.slots))
        ]


def _kernel(ring, cut, *refs, passing, following, kept, query_sum) -> None:
    hop, step, block = (pl.program_id(axis) for axis in range(3))
    queries, keys, query_grad, grads, slots = refs[:4], refs[4:7], refs[7], refs[8:10], refs[10:]
    # Gradients are sent in the last hop too.
    passing = Passing(ring=ring, cut=cut, sending_hops=ring.size, own=keys, slots=slots, **passing)
    following = Following(ring=ring, cut=cut, slots=grads, **following)
    kept = Kept(arrays=[query_grad], **kept)
    first, last = block == 0, block == cut.query_blocks - 1
    pl.when(first & (step == 0) & (hop == 0))(kept.reset)
    pl.when(first & (step == 0))(lambda: passing.start_hop(hop))
    pl.when(first)(lambda: passing.use_panel(hop, step))
    pl.when(first)(lambda: following.start_panel(hop, step))

    extent = pieces.query_extent(queries[0][0, 0])
    new = (hop == 0) & (lax.rem(step, cut.panels) == 0)

    def pull():
        sums = [total.at[lax.rem(hop * cut.steps + step, 2)] for total in following.sums]
        panels = [panel.at[lax.rem(step, 2)] for panel in passing.panels]
        visit = partial(passing.visit, extent)
        return _pull(cut, visit, [x[0, 0] for x in queries], panels, query_sum, sums)

    def add(one, other):
        return [one[0] + other[0]]

    active = new | passing.sees(extent)
    pl.when(active)(lambda: kept.update(step // cut.panels, block, new, compute=pull, merge=add))
    pl.when(~active)(kept.settle)
    pl.when(last)(lambda: following.end_panel(hop, step))
    pl.when(last & (step == cut.steps - 1))(lambda: passing.end_hop(hop))

    @pl.when(last & (step == cut.steps - 1) & (hop == ring.size - 1))
    def _():
        kept.settle()
        following.finish()


def _pull(cut: Cut, visit, queries, panels, query_sum, sums):
    """Adds to the gradients of a panel, and gives that of one block of queries, [rows h]."""
    query_tokens, query, cotangent, statistics = queries
    keys, values, key_tokens = panels
    key_sum, value_sum = sums
    log_sum, mean = (pieces.as_column(statistics[i : i + 1]) for i in range(2))
    query_sum[...] = jnp.zeros(query_sum.shape)

    def see(index):
        key, value = keys[index], values[index]
        scores = pieces.scores(cut, query, key, query_tokens, key_tokens[index])
        weights = jnp.exp(scores - log_sum)
        towards = pieces.product(cotangent, value, 1, 1)
        scores_grad = (weights * (towards - mean) * cut.head_dim**-0.5).astype(query.dtype)
        query_sum[...] += pieces.product(scores_grad, key, 1, 0)
        key_sum[index] += pieces.product(scores_grad, query, 0, 0)
        value_sum[index] += pieces.product(weights.astype(query.dtype), cotangent, 0, 0)

    visit(see)
    return [query_sum[...]]
