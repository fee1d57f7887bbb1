"""Attention of a sequence to itself by JAX's splash attention, a Pallas kernel for TPUs, forward and backward.

It knows two kinds of masks: one by place in the row, fixed when the program is made, whose empty blocks cost nothing, and
numbers of segments. Places give the causal half and how far a chunk can reach back; the numbers are those of `runs`, so
that the rule is `mask.visible` exactly. What a query that sees nothing is given is thrown away, with its gradient.

The kernel has no scale, so queries are scaled before it, which in bfloat16 rounds them once more than the reference does.
Memory beyond inputs and outputs: copies in the order [heads, length, head_dim], and 128 numbers of float32 a query and head
from which the forward pass takes the log-sum-exp.

Source: jax.experimental.pallas.ops.tpu.splash_attention; FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from llama4_jax.kernels.attention import runs

LANES = 128  # what a block of the kernel is a multiple of
LARGEST = 512  # tokens of a block: its scores, 1 MiB of float32, and all else fit the fast memory of every generation
LONGEST = 32_768  # pairs of blocks are looked at one by one on the host, some seconds, and listed in scalar memory


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
    interpret: bool = False,
) -> jax.Array:
    """As `reference.attend` of a sequence to itself, its documents' tokens in order; [b t n h] in the query's dtype.

    Args:
        query: [b t n h].
        key, value: [b t k h], of the same tokens, where k divides n.
        query_positions, query_segments: [b t] int, see `mask.visible`; the keys' are taken to be the same.
        chunk_size: positions in a chunk, or None.
        interpret: run in Pallas' interpreter, where there is no TPU.

    Raises NotImplementedError for what `refusal` names.
    """
    reason = refusal(query.shape, key.shape, query.dtype)
    if reason:
        raise NotImplementedError(f"splash attention does not do {reason}; use blockwise")
    del key_positions, key_segments
    numbers = runs.number(query_positions, query_segments, chunk_size)
    block = block_size(query.shape[1])
    length = query.shape[1] + -query.shape[1] % block
    kernel = _kernel(length, block, query.shape[2], chunk_size, interpret)
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    heads = (_heads_first(x, length) for x in (scaled, key, value))
    out = jax.vmap(functools.partial(_row, kernel))(*heads, _pad(numbers, length))  # [b n t h]
    out = einops.rearrange(out, "b n t h -> b t n h")[:, : query.shape[1]]
    return jnp.where((numbers != 0)[..., None, None], out, 0)


def refusal(query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype) -> str | None:
    """What of a call splash attention cannot do, in words, or None."""
    if query_shape[1] != key_shape[1]:
        return f"{query_shape[1]} queries to {key_shape[1]} keys, only a sequence to itself"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"{dtype}, only bfloat16 and float32"
    if query_shape[1] > LONGEST:
        return f"length={query_shape[1]}, at most {LONGEST} on a device"
    return None


def block_size(length: int) -> int:
    """Tokens of a block of queries or keys: at most a quarter of the length, so that little of a row is filling."""
    return max(LANES, min(LARGEST, 2 ** (length // 4).bit_length() // 2))


def _row(kernel, query: jax.Array, key: jax.Array, value: jax.Array, numbers: jax.Array) -> jax.Array:
    return kernel(query, key, value, segment_ids=splash_attention.SegmentIds(q=numbers, kv=numbers))


def _heads_first(array: jax.Array, length: int) -> jax.Array:
    """[b t n h] -> [b n length h]."""
    return einops.rearrange(_pad(array, length), "b t n h -> b n t h")


def _pad(array: jax.Array, length: int) -> jax.Array:
    """Filled up with zeros along axis 1: padding, as its number is 0."""
    return jnp.pad(array, [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


def _kernel(length: int, block: int, heads: int, chunk_size: int | None, interpret: bool):
    """The kernel for rows of so many tokens; the library makes its tables once for all layers."""
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    masks = splash_attention.MultiHeadMask([_mask(length, chunk_size)] * heads)
    return splash_attention.make_splash_mha_single_device(
        mask=masks, block_sizes=sizes, residual_checkpoint_name="attended", interpret=interpret
    )


def _mask(length: int, chunk_size: int | None):
    """By places: what no run allows is left out, and blocks of it are not visited."""
    shape = (length, length)
    if chunk_size is None or chunk_size >= length:
        return splash_attention.CausalMask(shape)
    return splash_attention.LocalMask(shape, window_size=(chunk_size - 1, 0), offset=0)
