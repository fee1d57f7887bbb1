"""A compiled step as numbers for people: memory by kind, work, and a step's time if everything overlapped perfectly.

Times are estimates of a roofline, not measurements: products at the stated rate, each byte of HBM and of the wire at the
stated bandwidth along one axis of the torus, what waits on the host at an assumed one, and the slowest of the four.
Attention is counted by formula, over the keys that the mask leaves in one document of `length` tokens, because its loops
depend on data.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from llama4_jax.config import Attention, Llama4Config, layer_kinds
from llama4_jax.config.train import REMAT
from llama4_jax.model import accounting
from llama4_jax.plan import hlo
from llama4_jax.plan.compiler import Answer
from llama4_jax.plan.count import Counts, count
from llama4_jax.plan.topology import Device

GIB = 2**30
# A block of scores takes two products forward. Backward a ring takes five, the scores again and four gradients; splash, which
# has whole rows, makes gradients of queries and of keys one after the other, and scores and one gradient twice: seven.
BACKWARD_PASSES = {"shared rows": 5 / 2, "whole rows": 7 / 2}


def memory(answer: Answer, arguments: dict[str, Any]) -> dict[str, float]:
    """GiB a device: of each kind of argument, of what the program makes besides, and at most at once."""
    kinds = {name: sum(map(_shard_bytes, jax.tree.leaves(tree))) / GIB for name, tree in arguments.items()}
    made = {"temporaries": answer.temporaries, "written_in_place": answer.in_place, "peak": answer.peak}
    made |= {"on_host": answer.on_host}
    return kinds | {name: size / GIB for name, size in made.items()}


def counts(text: str, mesh: Mesh) -> Counts:
    """Of the scheduled program, at an even load of the experts."""
    return count(hlo.parse(text), dict(mesh.shape))


def work(found: Counts) -> dict[str, Any]:
    """A device's share of a step."""
    return {
        "matrix_pflop": found.matrix_flops / 1e15,
        "hbm_tb": found.hbm_bytes / 1e12,
        "wire_gib": found.wire_bytes / GIB,
        "wire_gib_by_kind": {kind: value / GIB for kind, value in sorted(found.wire_by_kind.items())},
        "wire_gib_by_axes": {axes: value / GIB for axes, value in sorted(found.wire_by_axes.items())},
        "ragged_buffer_gib": found.ragged_buffer / GIB,
        "loops_counted_once": len(found.dynamic_loops),
    }


def attention_flops(config: Llama4Config, length: int, tokens: float, passes: float, imbalance: float = 1.0) -> float:
    """Of scores and weighted values for `tokens` tokens of documents of `length`, `passes` times a forward pass.

    imbalance: of the busiest device over the mean, in the layers that see everything before.
    """
    text, seen = config.text, 0.0
    for kind in layer_kinds(text):
        keys = accounting.visible_keys(text, kind.attention, length)
        seen += keys * (imbalance if kind.attention is Attention.GLOBAL else 1.0)
    return tokens * passes * 4.0 * text.attention.num_heads * text.attention.head_dim * seen


def attention_passes(remat: str, rows: str) -> float:
    """Of a training step, in forward passes: forward, backward, and forward again where the policy keeps no result.

    rows: "shared rows", which several devices hold parts of, or "whole rows".
    """
    kept = REMAT[remat]
    return 1 + BACKWARD_PASSES[rows] + (kept is not None and "attended" not in kept)


def estimates(
    device: Device, found: Counts, attention: float, model_flops: float, tokens: float, host_bytes: float = 0.0
) -> dict[str, float]:
    """Seconds of one step by each limit, and what they would make of it; estimates, not measured.

    host_bytes: what goes to the memory of the host and comes back.
    """
    seconds = {
        "products": (found.matrix_flops + attention) / device.flops,
        "hbm": found.hbm_bytes / device.hbm,
        "wire": found.wire_bytes / device.link,
        "host": host_bytes / device.host,
    }
    step = max(seconds.values())
    times = {f"seconds_{name}": value for name, value in seconds.items()} | {"seconds_step": step}
    rates = {"tokens_per_second": tokens / step, "mfu": model_flops / step / device.flops}
    return times | (rates if tokens else {})


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.ceil(math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) / 8)
