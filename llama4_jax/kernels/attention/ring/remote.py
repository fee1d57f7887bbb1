"""Ring attention in which the kernel itself sends: remote DMA from neighbour to neighbour while it computes. For TPUs.

What it computes is `portable`'s, to rounding, and so are its rules. Difference: the whole ring is one kernel, forward and
one backward, in which a transfer is under way during the products of the same hop by construction, not by XLA's choice.

What has been shown, and what not: in the interpreter it equals the reference on 2, 4 and 8 simulated devices, forward and
backward, its race detector finds nothing, and does when the kernel's credits are taken away; and it compiles for v5e, v5p,
v6e and tpu7x. It has never run on a chip: nothing is known of its speed, nor of how much of a transfer the products hide.
`portable` is the default for that reason.

Limits: the backward kernel takes 9 MiB of VMEM at head_dim 128 in bfloat16 whatever the length, and compiles up to head_dim
256 in float32. On v5p, whose devices have two cores, the kernels use one. Rings of one program must go along one axis of
the mesh, since a kernel's barrier tells calls apart by its number alone. In HBM a device holds, besides inputs and
outputs, two slots for a piece's keys and values and, backward, two for their gradients in float32.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv:2310.01889.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.kernels.attention.blocks import Blocking, Tokens
from llama4_jax.kernels.attention.ring import pieces, remote_backward, remote_forward
from llama4_jax.kernels.attention.ring.passing import Ring


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
    """As `portable.attend`; call it inside `jax.shard_map` over `axis_name`. Memory does not grow with the full length.

    Args:
        query: [b t n h], this device's.
        key, value: [b s k h], this device's, where k divides n. All devices have pieces of one length.
        query_positions, query_segments: [b t] int, see `mask.visible`.
        key_positions, key_segments: [b s] int.
        chunk_size: positions in a chunk, or None.
        axis_name: the mesh axis over which the sequence is spread.
        blocking: block sizes to use instead of those of `pieces.choose`. A chip wants queries in tiles of 16, keys in 128.

    Raises:
        NotImplementedError: for float64 and float16, and for a length spread over several axes of the mesh.
    """
    if not isinstance(axis_name, str):
        raise NotImplementedError(
            f"a remote ring along the axes {axis_name}; spread the length over one, or use portable"
        )
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"a remote ring of {query.dtype}; cast to bfloat16 or float32, or use portable")
    queries, keys = Tokens(query_positions, query_segments), Tokens(key_positions, key_segments)
    ring = Ring(axis_name=axis_name, size=lax.axis_size(axis_name))
    blocking = blocking or pieces.choose(query.shape, key.shape)
    return attend_pieces(ring, blocking, chunk_size, query, key, value, queries, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_pieces(
    ring: Ring, blocking: Blocking, chunk_size: int | None, query, key, value, queries, keys
) -> jax.Array:
    """`attend` along a given ring; `queries` and `keys` are `Tokens`."""
    return _forward(ring, blocking, chunk_size, query, key, value, queries, keys)[0]


def _forward(ring: Ring, blocking: Blocking, chunk_size: int | None, query, key, value, queries: Tokens, keys: Tokens):
    cut = pieces.cut(query.shape, key.shape, blocking)
    out, log_sum = remote_forward.forward(
        ring,
        cut,
        cut.split_queries(query),
        cut.split_keys(key),
        cut.split_keys(value),
        cut.query_tokens(queries, chunk_size),
        cut.key_tokens(keys),
    )
    out = cut.join_queries(out, query.shape[1]).astype(query.dtype)
    log_sum = cut.join_statistics(log_sum, query.shape[1])  # [b t n 1]
    return out, (query, key, value, queries, keys, out, log_sum[..., 0])


def _backward(ring: Ring, blocking: Blocking, chunk_size: int | None, saved, cotangent: jax.Array):
    query, key, value, queries, keys, out, log_sum = saved
    cut = pieces.cut(query.shape, key.shape, blocking)
    mean = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [b t n]
    # +inf makes the weights exp(score - inf) of a row that sees nothing 0.
    statistics = jnp.stack((jnp.where(jnp.isneginf(log_sum), jnp.inf, log_sum), mean), axis=-1)
    of_queries = (cut.query_tokens(queries, chunk_size), cut.split_queries(query), cut.split_queries(cotangent))
    query_grad, key_grad, value_grad = remote_backward.backward(
        ring,
        cut,
        (*of_queries, cut.split_statistics(statistics)),
        (cut.split_keys(key), cut.split_keys(value), cut.key_tokens(keys)),
    )
    query_grad = cut.join_queries(query_grad, query.shape[1]).astype(query.dtype)
    key_grad, value_grad = (cut.join_keys(x, key.shape[1]).astype(key.dtype) for x in (key_grad, value_grad))
    return query_grad, key_grad, value_grad, None, None


attend_pieces.defvjp(_forward, _backward)
