"""Attention for every path of the model: one call, several implementations, one suite of tests for all.

Here nothing depends on where in an array a token lies, only on positions and segments, so that a cache may hold its keys in
any order, and a ring that passes keys between devices passes these along and keeps the rule. Kernels of TPUs and GPUs, and
chunked layers over several devices, rely on one thing more, that tokens of a document follow each other: see `sequence`.
"""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.attention import blockwise, few_queries, reference

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "few_queries": few_queries.attend,
    "blockwise": blockwise.attend,
}

# Queries of one sequence that share a key-value head, up to which keys are read as if for one.
FEW_QUERIES = 16

# Where the two are equally fast on two CPU cores: 2**17 to 2**19 scores, counted over batch and heads. Beyond that the
# gap grows with length, in time (gradient at t = 512: five times) and in memory.
FEW_SCORES = 2**18

_logger = logging.getLogger(__name__)


def attend(
    query: jax.Array,
    key: jax.Array | QuantizedArray,
    value: jax.Array | QuantizedArray,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    chunk_size: int | None,
    implementation: str | None = None,
) -> jax.Array:
    """Each query's average of the values it may see (`mask.visible`), weighted by softmax; [b t n h] in query's dtype.

    Scores are query . key / sqrt(h), their softmax is taken in float32, and query head i reads key-value head
    i // (n / k). A query that sees nothing gives zeros, and its gradients are zero.

    Args:
        query: [b t n h].
        key, value: [b s k h], where k divides n; a cache's may be of few bits, with scales [b s k 1], and get no gradient.
        query_positions, query_segments: [b t] int: positions in the document from 0; document from 1, 0 for padding.
        key_positions, key_segments: [b s] int; position -1 marks an empty cache slot.
        chunk_size: positions in a chunk, or None for a layer that sees everything before.
        implementation: a name in `IMPLEMENTATIONS`, or None to choose by size.

    Raises:
        ValueError: for an unknown implementation, or shapes that do not belong together.
        NotImplementedError: for a dtype whose products are not computed here (integers, float8).
    """
    check(query, key, value, chunk_size)
    check_tokens("query", query, query_positions, query_segments)
    check_tokens("key", key, key_positions, key_segments)
    if implementation is None:
        implementation = choose(query.shape, key.shape)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; use None or one of {sorted(IMPLEMENTATIONS)}")
    with jax.named_scope("attend"):
        return IMPLEMENTATIONS[implementation](
            query,
            key,
            value,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segments=query_segments,
            key_segments=key_segments,
            chunk_size=chunk_size,
        )


@functools.lru_cache(maxsize=4096)
def choose(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> str:
    """The implementation that `attend` uses for these shapes, logged once for each.

    Args:
        query_shape: (b, t, n, h).
        key_shape: (b, s, k, h).
    """
    name, reason = by_size(query_shape, key_shape)
    _logger.info("attention uses %s for %s: %s", name, describe(query_shape, key_shape), reason)
    return name


def by_size(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> tuple[str, str]:
    """The implementation in `IMPLEMENTATIONS` that suits a call of this size, and why."""
    batch, query_length, heads, _ = query_shape
    if query_length * heads // key_shape[2] <= FEW_QUERIES:
        return "few_queries", f"at most {FEW_QUERIES} queries share a key"
    if batch * heads * query_length * key_shape[1] > FEW_SCORES:
        return "blockwise", f"scores are more than {FEW_SCORES}"
    return "reference", f"scores are not more than {FEW_SCORES}"


def describe(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> str:
    """The size of a call, in words."""
    rows = query_shape[0] * query_shape[2]
    return f"{rows} x {query_shape[1]} x {key_shape[1]} (batch and heads, queries, keys)"


def check(query: jax.Array, key: jax.Array, value: jax.Array, chunk_size: int | None) -> None:
    for name, array in {"query": query, "key": key, "value": value}.items():
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}; wanted 4 axes: batch, length, heads, head_dim")
        if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits < 16:
            raise NotImplementedError(
                f"attention over {name} of dtype {array.dtype}; cast to bfloat16 or float32 first"
            )
        if isinstance(array, QuantizedArray) and _unread(array):
            raise NotImplementedError(
                f"attention over {name} with scales {array.scales.shape}; only a scale for each token and head is read"
            )
    if (
        key.shape != value.shape
        or key.dtype != value.dtype
        or isinstance(key, QuantizedArray) != isinstance(value, QuantizedArray)
    ):
        raise ValueError(f"key is {key.shape} {key.dtype} but value is {value.shape} {value.dtype}; make them alike")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"query {query.shape} and key {key.shape} differ in batch or head_dim; these must be equal")
    if query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype} but key is {key.dtype}; cast the one read from the cache")
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        divisors = [k for k in range(1, heads + 1) if heads % k == 0]
        raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}; use one of {divisors}")
    if math.prod(query.shape) == 0 or key.shape[1] == 0:
        raise ValueError(f"query {query.shape} or key {key.shape} is empty; give at least one of each axis")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; wanted at least 1, or None for a layer without chunks")


def check_tokens(name: str, array: jax.Array, positions: jax.Array, segments: jax.Array) -> None:
    for kind, tokens in {"positions": positions, "segments": segments}.items():
        if tokens.shape != array.shape[:2]:
            raise ValueError(f"{name}_{kind} has shape {tokens.shape}; wanted {array.shape[:2]}, as {name} has tokens")
        if not jnp.issubdtype(tokens.dtype, jnp.signedinteger):
            raise ValueError(f"{name}_{kind} is {tokens.dtype}; wanted int32: bfloat16 and float32 lose positions")


def _unread(array: QuantizedArray) -> bool:
    """Whether it has another form than a scale for each token and head."""
    return array.scales.shape != (*array.shape[:3], 1) or array.offsets is not None
