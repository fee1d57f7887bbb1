"""Ring attention of what `blockwise` computes for one device: any backend that has `ppermute` runs it.

Each of n devices holds a piece of the sequence. Keys and values pass from device to device; after n - 1 hops every query
has met every key, and what it met is put together by the log-sum-exp of each part. The backward pass is a second ring,
in which the gradients of keys and values travel with them, n hops and so home. No device ever holds more than its own
piece and one that is passing through, whatever the full length.

The mask is `mask.visible`, a function of positions and segments, which travel along: packing, padding and any order of
the tokens over the devices (see `zigzag`) need nothing of their own, and parts that the mask empties cost no products.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv:2310.01889.
Difference: the parts that are merged are normalised already, so that one block kernel serves one device and many.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llama4_jax.kernels.attention import blocks, blockwise
from llama4_jax.kernels.attention.blocks import Blocking, Tokens


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    chunk_size: int | None,
    axis_name: str,
    blocking: Blocking | None = None,
) -> jax.Array:
    """As `reference.attend`, for one device's piece of the sequence; call it inside `jax.shard_map` over `axis_name`.

    Differentiable once, in reverse mode only.

    Args:
        query: [b t n h], this device's.
        key, value: [b s k h], this device's, where k divides n. All devices have pieces of one length.
        query_positions, query_segments: [b t] int, see `mask.visible`.
        key_positions, key_segments: [b s] int.
        chunk_size: positions in a chunk, or None.
        axis_name: the mesh axis over which the sequence is spread.
        blocking: block sizes to use instead of those of `blocks.choose`.
    """
    rows = query.shape[0] * query.shape[2]
    blocking = blocking or blocks.choose(rows, query.shape[1], key.shape[1], chunk_size)
    queries, keys = Tokens(query_positions, query_segments), Tokens(key_positions, key_segments)
    return _attend(blocking, axis_name, query, key, value, queries, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(blocking: Blocking, axis_name: str, query, key, value, queries: Tokens, keys: Tokens) -> jax.Array:
    return _forward(blocking, axis_name, query, key, value, queries, keys)[0]


def _forward(blocking: Blocking, axis_name: str, query, key, value, queries: Tokens, keys: Tokens):
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def meet(seen, passing):
        key, value, keys = passing
        return _merge(seen, blockwise.forward(blocking, query, key, value, queries, keys, wide))

    def hop(_, carry):
        seen, passing = carry
        # Sent before it is used, so that the transfer has the products to hide behind.
        return meet(seen, passing), _pass_on(passing, axis_name)

    nothing = (jnp.zeros(query.shape, wide), jnp.full(query.shape[:3], -jnp.inf, wide))
    carry = (nothing, (key, value, keys))
    seen, passing = lax.fori_loop(0, lax.axis_size(axis_name) - 1, hop, carry)
    out, log_sum = meet(seen, passing)
    # Worth keeping where all else is recomputed: keys need not go round once more.
    out, log_sum = (checkpoint_name(part, "attended") for part in (out.astype(query.dtype), log_sum))
    return out, (query, key, value, queries, keys, out, log_sum)


def _backward(blocking: Blocking, axis_name: str, saved, cotangent: jax.Array):
    query, key, value, queries, keys, out, log_sum = saved
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def hop(_, carry):
        query_grad, passing, grads = carry
        key, value, keys = passing
        to_query, *to_passing = blockwise.backward(blocking, query, key, value, queries, keys, out, log_sum, cotangent)
        grads = jax.tree.map(jnp.add, grads, tuple(to_passing))
        return query_grad + to_query, *_pass_on((passing, grads), axis_name)

    zeros = (jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide))
    carry = (jnp.zeros(query.shape, wide), (key, value, keys), zeros)
    query_grad, _, (key_grad, value_grad) = lax.fori_loop(0, lax.axis_size(axis_name), hop, carry)
    return query_grad.astype(query.dtype), key_grad.astype(key.dtype), value_grad.astype(value.dtype), None, None


_attend.defvjp(_forward, _backward)


def _pass_on(tree, axis_name: str):
    """What the device before has."""
    size = lax.axis_size(axis_name)
    return lax.ppermute(tree, axis_name, [(i, (i + 1) % size) for i in range(size)])


def _merge(one, other):
    """Two parts (out [b t n h], log-sum-exp [b t n]) of the same queries' attention, over keys that each part saw."""
    (out, log_sum), (other_out, other_log_sum) = one, other
    together = jnp.logaddexp(log_sum, other_log_sum)  # -inf where neither saw anything

    def share(part):
        return jnp.where(jnp.isneginf(together), 0.0, jnp.exp(part - together))[..., None]

    return share(log_sum) * out + share(other_log_sum) * other_out, together
