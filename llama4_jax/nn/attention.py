"""Decoder self-attention: chunked with rotary positions, or global without (iRoPE), with a key/value cache.

Source: Llama 4's published models; `Llama4TextAttention` in transformers and `Attention` in Meta's llama-models, which
this equals in prefill. Differences: positions, chunks and temperature all follow the true position of a token in its
own document, so left padding and packing change nothing.
"""

from __future__ import annotations

import dataclasses

import einops
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from llama4_jax.config import Attention, AttentionConfig, LayerKind
from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import attention as kernels
from llama4_jax.nn import products, rope
from llama4_jax.nn.linear import Linear, TransposedLinear, together
from llama4_jax.nn.norm import rms_normalize

CACHED_AS = jax.make_user_context(None)
"""`with CACHED_AS("int8"):` what is traced inside attends, without a cache too, to what one of int8 would hold; see `train.qat`."""


@struct.dataclass
class Context:
    """Where each token of a call stands; the same for every layer.

    positions: [b t] int32, from 0 in each document; negative where there is no token.
    segments:  [b t] int32, the document of each token; 0 where there is no token.
    turns:     [b t head_dim/2] float32 each, cosines and sines of the positions' rotary angles.
    lengths:   [b] int32, tokens already cached in each row; None without a cache.
    rows:      what is promised of all rows.
    """

    positions: jax.Array
    segments: jax.Array
    turns: rope.Turns
    lengths: jax.Array | None = None
    rows: kernels.Rows = struct.field(pytree_node=False, default=kernels.Rows.ANY)


@struct.dataclass
class LayerCache:
    """Keys and values of one layer, [b k s h]; the token at position p sits in slot p % s.

    Invariant: a row's tokens have positions 0 .. length-1, so which position a slot holds follows from the length.
    A chunked layer needs s >= min(chunk, length) slots, a global layer one for each position it will ever hold.
    Heads come before slots because that is how attention reads them: any other order is copied at each step.
    Keys and values of few bits have scales [b k s 1], a scale for each token and head, and are rounded as they are written.
    """

    keys: jax.Array | QuantizedArray
    values: jax.Array | QuantizedArray

    @property
    def slots(self) -> int:
        return self.keys.shape[-2]


class DecoderAttention(nnx.Module):
    """Grouped-query attention of one layer kind; x [b t d] in, [b t d] out."""

    def __init__(
        self,
        config: AttentionConfig,
        kind: LayerKind,
        embed_dim: int,
        *,
        norm_eps: float,
        rngs: nnx.Rngs,
        output_gain: float = 1.0,
        dtype=jnp.float32,
    ):
        self.config, self.kind, self.norm_eps = config, kind, norm_eps

        def project(heads: int, name: str) -> Linear:
            axes = ("embed", name, "head_dim")
            return Linear((embed_dim,), (heads, config.head_dim), axes, rngs=rngs, bias=config.bias, dtype=dtype)

        self.query = project(config.num_heads, "heads")
        self.key = project(config.num_kv_heads, "kv_heads")
        self.value = project(config.num_kv_heads, "kv_heads")
        self.output = Linear(
            (config.num_heads, config.head_dim),
            (embed_dim,),
            ("heads", "head_dim", "embed"),
            rngs=rngs,
            bias=config.bias,
            gain=output_gain,
            dtype=dtype,
        )

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        with jax.named_scope("qkv"):
            query, key, value = self.project(x)
        if self.kind.rope:
            with jax.named_scope("rope"):
                query, key = rope.rotate(query, context.turns), rope.rotate(key, context.turns)
        if self.kind.qk_norm:  # after RoPE, over each head: what is cached is rotated and normed
            query, key = rms_normalize(query, self.norm_eps), rms_normalize(key, self.norm_eps)
        if self.kind.temperature:
            scale = temperature(context.positions, self.config)[..., None, None]
            query = (query.astype(jnp.float32) * scale).astype(query.dtype)
        query, key, value = (checkpoint_name(x, "query_key_value") for x in (query, key, value))
        with jax.named_scope("attend"):
            attended, cache = self._attend(query, key, value, context, cache)
        return self.output(attended), cache

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [b t n h], keys and values [b t k h]."""
        return tuple(together(x, self.query, self.key, self.value))

    def _attend(self, query, key, value, context: Context, cache: LayerCache | None):
        chunk_size = self.config.chunk_size if self.kind.attention is Attention.CHUNKED else None
        if cache is None:
            tokens = context.positions, context.segments
            key, value = (products.rounded(x, CACHED_AS.value) for x in (key, value))  # gradients pass straight through
            return kernels.attend_sequence(query, key, value, *tokens, chunk_size, context.rows), None
        new = _stored(key, cache.keys), _stored(value, cache.values)  # as it will be read, by this call too
        old, cache = cache, _write(cache, *new, context)
        if chunk_size is None or query.shape[1] == 1:
            # All that the query may see is in the cache by now.
            key, value = _tokens_first(cache)
            key_positions = _held_positions(cache.slots, _lengths_after(context))
        else:
            # Of several new tokens, early ones may still need keys that later ones have just replaced.
            key, value = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), _tokens_first(old), new)
            held = _held_positions(old.slots, context.lengths)
            key_positions = jnp.concatenate([held, context.positions], axis=1)
        attended = kernels.attend(
            query,
            key.astype(query.dtype),
            value.astype(query.dtype),
            query_positions=context.positions,
            key_positions=key_positions,
            # A cached row is one document.
            query_segments=(context.positions >= 0).astype(jnp.int32),
            key_segments=(key_positions >= 0).astype(jnp.int32),
            chunk_size=chunk_size,
        )
        return attended, cache


class FusedAttention(DecoderAttention):
    """The same attention for decoding on a CPU: one product makes queries, keys and values."""

    def __init__(self, attention: DecoderAttention):
        self.config, self.kind, self.norm_eps = attention.config, attention.kind, attention.norm_eps
        self.query_key_value = TransposedLinear(attention.query, attention.key, attention.value)
        self.output = TransposedLinear(attention.output)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        n, k = self.config.num_heads, self.config.num_kv_heads
        return tuple(jnp.split(self.query_key_value(x), (n, n + k), axis=2))


def temperature(positions: jax.Array, config: AttentionConfig) -> jax.Array:
    """What global layers multiply queries by: 1 + attn_scale * log(1 + floor((position + 1) / floor_scale)), fp32.

    Integer division keeps every position in its own step; in bfloat16 positions near a step land in the wrong one.
    """
    steps = ((positions + 1) // config.floor_scale).astype(jnp.float32)
    return 1.0 + config.attn_scale * jnp.log1p(steps)


def _lengths_after(context: Context) -> jax.Array:
    """Tokens in each row once this call's are written, [b]."""
    return jnp.maximum(context.lengths, jnp.max(context.positions, axis=1) + 1)


def _held_positions(slots: int, lengths: jax.Array) -> jax.Array:
    """The position in each slot, [b s]: the latest one congruent to the slot, or negative when it is empty."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    return slot + slots * ((lengths[:, None] - 1 - slot) // slots)  # floors to a negative turn when empty


def _stored(new: jax.Array, held: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
    """New keys or values [b t k h] in the form of those held."""
    if not isinstance(held, QuantizedArray):
        return new.astype(held.dtype)
    values, scales = quantized.quantize_rows(new, held.values.dtype.name)
    return dataclasses.replace(held, values=values, scales=scales)


def _tokens_first(cache: LayerCache) -> tuple[jax.Array | QuantizedArray, jax.Array | QuantizedArray]:
    """Keys and values as attention takes them, [b s k h]."""
    return jax.tree.map(lambda x: einops.rearrange(x, "b k s h -> b s k h"), (cache.keys, cache.values))


def _write(cache: LayerCache, key, value, context: Context) -> LayerCache:
    """Stores the new keys and values, of which a chunked layer keeps those that are among its row's last."""
    oldest = jnp.maximum(_lengths_after(context) - cache.slots, 0)
    kept = context.positions >= oldest[:, None]
    slots = jnp.where(kept, context.positions % cache.slots, cache.slots)[:, None]  # [b 1 t]; past the end: dropped
    batch, heads = cache.keys.shape[:2]
    rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]

    def put(buffer, new):
        return buffer.at[rows, heads, slots].set(einops.rearrange(new, "b t k h -> b k t h"), mode="drop")

    return jax.tree.map(put, cache, LayerCache(keys=key, values=value))
