"""The forward kernel of a remote ring: one call for all hops, in which each device computes with one piece as it sends it on.

The grid is hops x panels of keys x blocks of queries. A step takes one block of queries through the blocks of one panel by
the online softmax, and merges the result by its log-sum-exp with what the block has seen before, as `portable` does.
"""

from __future__ import annotations

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

BARRIER = 17  # this kernel's own; two rings along different axes of one mesh may not be in one program
VMEM_BYTES = 32 * 2**20


def forward(ring: Ring, cut: Cut, query, key, value, query_tokens, key_tokens) -> tuple[jax.Array, jax.Array]:
    """Attention [heads blocks rows h] and the log-sum-exp of its scores [heads blocks 1 rows], both float32.

    Arguments are cut by `cut`. The log-sum-exp is -inf where nothing is seen, and the output there zero.
    """
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    kept = [(cut.rows, cut.head_dim), (1, cut.rows)]
    heads = query.shape[:2]
    # Said of the arrays too: XLA likes to put small ones in VMEM, where other devices would then write.
    outputs = [pltpu.HBM((*heads, *block), jnp.float32) for block in kept]
    outputs += [pltpu.HBM((2, *x.shape), x.dtype) for x in (key, value, key_tokens)]  # the slots of what passes
    rows = cut.kv_heads * cut.panels
    out, log_sum, *_ = pl.pallas_call(
        partial(_kernel, ring, cut),
        grid=(ring.size, cut.steps, cut.query_blocks),
        in_specs=[
            pl.BlockSpec((1, 1, *query_tokens.shape[2:]), lambda hop, step, block: (step // rows, block, 0, 0)),
            pl.BlockSpec((1, 1, *kept[0]), lambda hop, step, block: (step // cut.panels, block, 0, 0)),
            *[in_hbm] * 3,
        ],
        out_specs=[in_hbm] * len(outputs),
        out_shape=outputs,
        scratch_shapes={
            "passing": Passing.scratch(cut, key.dtype),
            "kept": Kept.scratch(kept),
            "sums": [pltpu.VMEM((cut.rows, width), jnp.float32) for width in (1, 1, cut.head_dim)],
        },
        compiler_params=parameters(BARRIER),
        name="ring_attention_forward",
    )(query_tokens, query, key, value, key_tokens)
    return out, log_sum


def parameters(barrier: int) -> pltpu.CompilerParams:
    """Of a kernel whose steps are taken in order and that other devices write to."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary",) * 3,
        collective_id=barrier,
        has_side_effects=True,
        vmem_limit_bytes=VMEM_BYTES,
    )


def _kernel(ring, cut, query_tokens, query, key, value, key_tokens, *outputs, passing, kept, sums) -> None:
    hop, step, block = (pl.program_id(axis) for axis in range(3))
    passing = Passing(
        ring=ring,
        cut=cut,
        sending_hops=ring.size - 1,
        own=(key, value, key_tokens),
        slots=outputs[2:],
        **passing,
    )
    kept = Kept(arrays=outputs[:2], **kept)
    first, last = (step == 0) & (block == 0), (step == cut.steps - 1) & (block == cut.query_blocks - 1)
    pl.when(first & (hop == 0))(kept.reset)
    pl.when(first)(lambda: passing.start_hop(hop))
    pl.when(block == 0)(lambda: passing.use_panel(hop, step))

    extent = pieces.query_extent(query_tokens[0, 0])
    new = (hop == 0) & (lax.rem(step, cut.panels) == 0)

    def attend():
        panels = [panel.at[lax.rem(step, 2)] for panel in passing.panels]
        return _attend(cut, partial(passing.visit, extent), (query_tokens[0, 0], query[0, 0]), panels, sums)

    active = new | passing.sees(extent)
    pl.when(active)(lambda: kept.update(step // cut.panels, block, new, compute=attend, merge=_merge))
    pl.when(~active)(kept.settle)
    pl.when(last & (hop == ring.size - 1))(kept.settle)
    pl.when(last)(lambda: passing.end_hop(hop))


def _attend(cut: Cut, visit, queries, panels, sums):
    """One block of queries [rows h] over a panel: its part of the output [rows h] and the log-sum-exp [1 rows]."""
    (query_tokens, query), (keys, values, key_tokens) = queries, panels
    peak, total, out = sums
    peak[...] = jnp.full(peak.shape, jnp.finfo(jnp.float32).min)  # not -inf: -inf - -inf is no number
    total[...] = jnp.zeros(total.shape)
    out[...] = jnp.zeros(out.shape)

    def see(index):
        scores = pieces.scores(cut, query, keys[index], query_tokens, key_tokens[index])
        new_peak = jnp.maximum(peak[...], scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_peak)
        shrink = jnp.exp(peak[...] - new_peak)
        peak[...] = new_peak
        total[...] = shrink * total[...] + weights.sum(-1, keepdims=True)
        block = values[index]
        # The second product runs in the inputs' precision.
        out[...] = shrink * out[...] + jnp.dot(weights.astype(block.dtype), block, preferred_element_type=jnp.float32)

    visit(see)
    some = jnp.where(total[...] > 0, total[...], 1.0)
    log_sum = jnp.where(total[...] > 0, peak[...] + jnp.log(some), -jnp.inf)
    return out[...] / some, pieces.as_row(log_sum)


def _merge(one, other):
    """Two parts (out [rows h], log-sum-exp [1 rows]) of the same queries' attention, over keys that each part saw."""
    (out, log_sum), (other_out, other_log_sum) = one, other
    peak = jnp.maximum(log_sum, other_log_sum)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)  # neither saw anything
    share, other_share = jnp.exp(log_sum - peak), jnp.exp(other_log_sum - peak)
    total = share + other_share
    some = jnp.where(total > 0, total, 1.0)
    share, other_share = pieces.as_column(share / some), pieces.as_column(other_share / some)
    return share * out + other_share * other_out, jnp.where(total > 0, peak + jnp.log(some), -jnp.inf)
