"""A compiled step as numbers for people: memory by kind, work, and a step's time if everything overlapped perfectly.

Times are estimates of a roofline, not measurements: products at the stated rate, each byte of HBM and of the wire at the
stated bandwidth along one axis of the torus, and the slowest of the three. Attention is counted by formula, over the keys
that the mask leaves in one document of `length` tokens, because its loops depend on data.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from llama4_jax.config import Llama4Config, layer_kinds
from llama4_jax.model import accounting
from llama4_jax.nn import expert_parallel
from llama4_jax.plan import hlo
from llama4_jax.plan.count import Counts, count
from llama4_jax.plan.topology import Device

GIB = 2**30
# Gathers and scatters of the SparseCore stand in the program's text in a form that JAX's own reader refuses.
OPTIONS = {
    "xla_tpu_enable_offloading_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, or how far it is from fitting: `over` in GiB, where the compiler refused it."""

    program: jax.stages.Compiled | None
    seconds: float
    over: float = 0.0


def compile_step(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles for the devices that `lowered` was made for; what does not fit into their memory is a result, no error."""
    start = time.perf_counter()
    try:
        return Compiled(lowered.compile(compiler_options=OPTIONS), time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([MG])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found:
            raise
        over = float(found.group(1)) / (1 if found.group(2) == "G" else 1024)
        return Compiled(None, time.perf_counter() - start, over)


def memory(compiled: jax.stages.Compiled, arguments: dict[str, Any]) -> dict[str, float]:
    """GiB a device: of each kind of argument, of what the program makes besides, and at most at once."""
    found = compiled.memory_analysis()
    kinds = {name: sum(map(_shard_bytes, jax.tree.leaves(tree))) / GIB for name, tree in arguments.items()}
    # Not arguments and temporaries added up: those are more than are ever held at once.
    peak = found.peak_memory_in_bytes
    return kinds | {"temporaries": found.temp_size_in_bytes / GIB, "peak": peak / GIB}


def counts(compiled: jax.stages.Compiled, mesh: Mesh) -> Counts:
    """Of the scheduled program, at an even load of the experts."""
    sizes = dict(mesh.shape)
    fill = 1 / expert_parallel.MARGIN if sizes["expert"] > 1 else 1.0
    return count(hlo.parse(compiled.as_text()), sizes, fill=fill)


def work(found: Counts) -> dict[str, Any]:
    """A device's share of a step."""
    return {
        "matrix_pflop": found.matrix_flops / 1e15,
        "hbm_tb": found.hbm_bytes / 1e12,
        "wire_gib": found.wire_bytes / GIB,
        "wire_gib_by_axes": {axes: value / GIB for axes, value in sorted(found.wire_by_axes.items())},
        "ragged_buffer_gib": found.ragged_buffer / GIB,
        "loops_counted_once": len(found.dynamic_loops),
    }


def attention_flops(config: Llama4Config, length: int, tokens: float, passes: float) -> float:
    """Of scores and weighted values for `tokens` tokens of documents of `length`, `passes` times a forward pass."""
    text = config.text
    seen = sum(accounting.visible_keys(text, kind.attention, length) for kind in layer_kinds(text))
    return tokens * passes * 4.0 * text.attention.num_heads * text.attention.head_dim * seen


def estimates(device: Device, found: Counts, attention: float, model_flops: float, tokens: float) -> dict[str, float]:
    """Seconds of one step by each limit, and what they would make of it; estimates, not measured."""
    seconds = {
        "products": (found.matrix_flops + attention) / device.flops,
        "hbm": found.hbm_bytes / device.hbm,
        "wire": found.wire_bytes / device.link,
    }
    step = max(seconds.values())
    return {f"seconds_{name}": value for name, value in seconds.items()} | {
        "seconds_step": step,
        "tokens_per_second": tokens / step,
        "mfu": model_flops / step / device.flops,
    }


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
