"""All-to-all of parts of uneven size between the devices along one mesh axis.

TPUs and GPUs have it as one operation; XLA's CPU backend does not, and there the same result is gathered together.
"""

from __future__ import annotations

import jax
from jax import lax

from llama4_jax.core import partitioning
from llama4_jax.kernels.exchange import emulated

IMPLEMENTATIONS = {"native": lax.ragged_all_to_all, "emulated": emulated.ragged_all_to_all}


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
        implementation: a name in `IMPLEMENTATIONS`, or None to choose by platform.

    Raises ValueError for an unknown implementation. Source: `jax.lax.ragged_all_to_all`.
    """
    if implementation is None:
        implementation = "emulated" if partitioning.platform() == "cpu" else "native"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; use None or one of {sorted(IMPLEMENTATIONS)}")
    call = IMPLEMENTATIONS[implementation]
    return call(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis_name)
