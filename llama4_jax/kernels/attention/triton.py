"""Attention of a sequence to itself for GPUs: Pallas kernels that Triton compiles, forward and backward.

A block of queries meets the blocks of keys from the first token of its oldest run (see `runs`) to itself, and a block of keys
the queries up to the last token of its newest run: work follows the documents and chunks that are there, as in `blockwise`.
Heads of a group read their key-value head where it lies; nothing is repeated, and no array is put in another order.

What has been shown, and what not: in Pallas' interpreter they equal the reference, and they compile as the tests say. They
have never run on a GPU: nothing is known of their speed.

Source: Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023), as two backward kernels; differences from them: runs.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama4_jax.kernels.attention import runs, triton_kernels

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
SMALLEST_HEAD = 16  # of a matrix that tensor cores multiply
LARGEST_HEAD = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """How the kernels are made: tokens of a block, a power of two, and whether Pallas interprets them."""

    block: int
    interpret: bool


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
    block: int = 64,
    interpret: bool = False,
) -> jax.Array:
    """As `reference.attend` of a sequence to itself, its documents' tokens in order; [b t n h] in the query's dtype.

    Differentiable once, in reverse mode only.

    Args:
        query: [b t n h].
        key, value: [b t k h], of the same tokens, where k divides n.
        query_positions, query_segments: [b t] int, see `mask.visible`; the keys' are taken to be the same.
        chunk_size: positions in a chunk, or None.
        block: tokens of a block.
        interpret: run in Pallas' interpreter, where there is no GPU.

    Raises NotImplementedError for what `refusal` names.
    """
    reason = refusal(query.shape, key.shape, query.dtype)
    if reason:
        raise NotImplementedError(f"Triton's kernels do not do {reason}; use blockwise")
    del key_positions, key_segments
    numbers = runs.number(query_positions, query_segments, chunk_size)
    length, head_dim = query.shape[1], query.shape[3]
    filling = -length % block
    wide = max(SMALLEST_HEAD, pl.next_power_of_2(head_dim)) - head_dim
    filled = (jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, wide))) for x in (query, key, value))
    numbers = jnp.pad(numbers, ((0, 0), (0, filling)))  # number 0 is padding
    kernel = Kernel(block=block, interpret=interpret)
    return _attend(kernel, head_dim**-0.5, *filled, numbers)[:, :length, :, :head_dim]


def refusal(query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype) -> str | None:
    """What of a call the kernels cannot do, in words, or None."""
    if query_shape[1] != key_shape[1]:
        return f"{query_shape[1]} queries to {key_shape[1]} keys, only a sequence to itself"
    if dtype not in DTYPES:
        return f"{dtype}, only bfloat16, float16 and float32"
    if query_shape[3] > LARGEST_HEAD:
        return f"head_dim={query_shape[3]}, at most {LARGEST_HEAD}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Kernel, scale: float, query, key, value, numbers) -> jax.Array:
    return _forward(kernel, scale, query, key, value, numbers)[0]


def _attend_forward(kernel: Kernel, scale: float, query, key, value, numbers):
    parts = _forward(kernel, scale, query, key, value, numbers)
    out, log_sum = (checkpoint_name(part, "attended") for part in parts)  # worth keeping where all else is recomputed
    return out, (query, key, value, numbers, out, log_sum)


def _attend_backward(kernel: Kernel, scale: float, saved, cotangent: jax.Array):
    query, key, value, numbers, out, log_sum = saved
    mean = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)  # [b n t]
    gradients = _backward(kernel, scale, (query, cotangent, log_sum, mean), (key, value), numbers)
    return *gradients, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(kernel: Kernel, scale: float, query, key, value, numbers):
    """Attention [b t n h], and the log-sum-exp of each row's scores to base 2, [b n t]; +inf where nothing is seen."""
    parts = _Parts(kernel, query.shape, key.shape[2])
    run = parts.call(
        functools.partial(triton_kernels.forward, kernel.block, scale),
        heads=query.shape[2],
        inputs=[parts.bound, parts.block, (parts.row_of_keys,) * 2, parts.tokens],
        outputs=[parts.block, parts.block_of_statistics],
        shapes=[query, _statistics(query)],
        name="attention_forward",
    )
    return run(_first_block(numbers, kernel.block), query, (key, value), numbers)


def _backward(kernel: Kernel, scale: float, of_queries, key_value, numbers):
    """Gradients of query, key and value, in their dtypes; of_queries: query, cotangent, log-sum-exp and mean."""
    query, (key, value), block = of_queries[0], key_value, kernel.block
    parts = _Parts(kernel, query.shape, key.shape[2])
    to_queries = parts.call(
        functools.partial(triton_kernels.query_gradient, block, scale),
        heads=query.shape[2],
        inputs=[parts.bound, (parts.block,) * 2 + (parts.block_of_statistics,) * 2]
        + [(parts.row_of_keys,) * 2, parts.tokens],
        outputs=[parts.block],
        shapes=[query],
        name="attention_query_gradient",
    )
    to_keys = parts.call(
        functools.partial(triton_kernels.key_gradients, block, scale, parts.group),
        heads=key.shape[2],
        inputs=[parts.bound, (parts.group_of_rows,) * 2 + (parts.group_of_statistics,) * 2]
        + [(parts.block,) * 2, parts.tokens],
        outputs=[parts.block, parts.block],
        shapes=[key, value],
        name="attention_key_gradients",
    )
    arrays = (of_queries, key_value, numbers)
    return *to_queries(_first_block(numbers, block), *arrays), *to_keys(_end_block(numbers, block), *arrays)


class _Parts:
    """Which part of each array a step of the grid (blocks of the row, rows, heads) is given."""

    def __init__(self, kernel: Kernel, query_shape: tuple[int, ...], kv_heads: int):
        _, length, heads, head_dim = query_shape
        group, block = heads // kv_heads, kernel.block
        self.kernel, self.query_shape, self.group = kernel, query_shape, group
        self.bound = pl.BlockSpec((None, None), lambda i, b, n: (b, i))
        self.tokens = pl.BlockSpec((None, length), lambda i, b, n: (b, 0))
        self.block = pl.BlockSpec((None, block, None, head_dim), lambda i, b, n: (b, i, n, 0))
        self.block_of_statistics = pl.BlockSpec((None, None, block), lambda i, b, n: (b, n, i))
        # Nothing of a row is copied before the kernel asks for it.
        self.row_of_keys = pl.BlockSpec((None, length, None, head_dim), lambda i, b, n: (b, 0, lax.div(n, group), 0))
        self.group_of_rows = pl.BlockSpec((None, length, group, head_dim), lambda i, b, k: (b, 0, k, 0))
        self.group_of_statistics = pl.BlockSpec((None, group, length), lambda i, b, k: (b, k, 0))

    def call(self, body, *, heads: int, inputs, outputs, shapes, name: str):
        batch, length, _, head_dim = self.query_shape
        return pl.pallas_call(
            body,
            grid=(length // self.kernel.block, batch, heads),
            in_specs=inputs,
            out_specs=outputs,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
            compiler_params=plgpu.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=2),
            name=name,
            interpret=self.kernel.interpret,
        )


def _statistics(query: jax.Array) -> jax.ShapeDtypeStruct:
    batch, length, heads, _ = query.shape
    return jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)


def _first_block(numbers: jax.Array, block: int) -> jax.Array:
    """The first block of keys that each block of queries may see; int32 [b blocks].

    Numbers rise along the row, so the oldest run of a block is that of its first token, padding apart.
    """
    place = jnp.arange(numbers.shape[1], dtype=jnp.int32)
    began = lax.cummax(jnp.where(runs.differs(numbers), place, 0), axis=1)
    return began.reshape(len(numbers), -1, block).min(-1) // block


def _end_block(numbers: jax.Array, block: int) -> jax.Array:
    """The first block of queries that may see nothing of each block of keys, nor any after it; int32 [b blocks]."""
    length = numbers.shape[1]
    ends = jnp.roll(runs.differs(numbers), -1, axis=1)
    place = jnp.arange(1, length + 1, dtype=jnp.int32)
    end = lax.cummin(jnp.where(ends, place, length), axis=1, reverse=True)
    return (end.reshape(len(numbers), -1, block).max(-1) + block - 1) // block
