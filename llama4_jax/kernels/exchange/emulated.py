"""`lax.ragged_all_to_all` out of all-gathers: each device sees all that was sent and keeps its own. For CPUs, and slow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """As `api.ragged_all_to_all`."""
    del recv_sizes  # what the senders say is enough here
    devices, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    sent = lax.all_gather(operand, axis_name, tiled=True)  # [p*m ..]

    def mine(numbers):  # [s] of each sender to the n that each has for this device, [p n]
        return lax.all_gather(numbers, axis_name).reshape(devices, devices, -1)[:, me]

    source, size, target = mine(input_offsets), mine(send_sizes), mine(output_offsets)
    source += jnp.arange(devices, dtype=source.dtype)[:, None] * operand.shape[0]
    source, size, target = source.ravel(), size.ravel(), target.ravel()
    row = jnp.arange(output.shape[0], dtype=target.dtype)[:, None]
    written = (target <= row) & (row < target + size)  # [r p*n]
    part = jnp.argmax(written, axis=1)
    new = sent[jnp.clip(source[part] + row[:, 0] - target[part], 0, sent.shape[0] - 1)]
    keep = jnp.any(written, axis=1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(keep, new, output)
