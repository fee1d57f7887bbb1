"""All-to-all of parts of uneven size between the devices along one mesh axis.

TPUs and GPUs have it as one operation. XLA's CPU backend does not, nor do slices of more than 16 v5e chips, of which the
compiler says that they route too little; there the same result is gathered together.
"""

from __future__ import annotations

import functools
import logging

import jax
from jax import lax

from llama4_jax.core import partitioning
from llama4_jax.kernels.exchange import emulated

IMPLEMENTATIONS = {"native": lax.ragged_all_to_all, "emulated": emulated.ragged_all_to_all}

_V5E, _MOST_V5E = "TPU v5 lite", 16  # chips of a slice in which each reaches every other

_logger = logging.getLogger(__name__)


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
    implementation: str | None = None,
) -> jax.Array:
    """`output` [r ..] with the rows that the p devices along `axis_name` sent here; call it inside `jax.shard_map`.

    Of s = p * n parts, parts i n .. i n + n - 1 go to device i: rows `input_offsets[j] .. + send_sizes[j]` of `operand`
    are written from row `output_offsets[j]` of that device's `output`. Not differentiable: its user says what returns.

    Args:
        operand: [m ..], with the trailing axes and dtype of output.
        output: [r ..]; rows that nobody writes stay as they are.
        input_offsets, send_sizes, output_offsets: [s] int32.
        recv_sizes: [s] int32, rows that come from each device, n numbers for each.
        implementation: a name in `IMPLEMENTATIONS`, or None for what `choose` says.

    Raises ValueError for an unknown implementation. Source: `jax.lax.ragged_all_to_all`.
    """
    if implementation is None:
        device = jax.sharding.get_abstract_mesh().abstract_device
        kind = device.device_kind if device else partitioning.platform()
        implementation = choose(partitioning.platform(), kind, jax.sharding.get_abstract_mesh().size)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; use None or one of {sorted(IMPLEMENTATIONS)}")
    call = IMPLEMENTATIONS[implementation]
    return call(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis_name)


@functools.cache
def choose(platform: str, kind: str, devices: int) -> str:
    """The implementation for a platform ("cpu", "gpu", "tpu"), a kind of device as JAX names it, and a size of mesh.

    Where it is not the operation itself, on an accelerator, that is logged once, with the reason.
    """
    if kind == _V5E and devices > _MOST_V5E:
        _logger.warning(
            "rows for experts are gathered, which sends more: slices of more than %d v5e chips have no ragged exchange",
            _MOST_V5E,
        )
        return "emulated"
    return "emulated" if platform == "cpu" else "native"
