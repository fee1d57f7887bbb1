"""One pre-norm decoder layer of any kind: x + attention(norm(x)), then + feed_forward(norm(.))."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama4_jax.config import FeedForward, LayerKind, TextConfig
from llama4_jax.nn.attention import Context, DecoderAttention, LayerCache
from llama4_jax.nn.mlp import Mlp
from llama4_jax.nn.moe import Moe
from llama4_jax.nn.norm import RMSNorm


class Block(nnx.Module):
    def __init__(self, config: TextConfig, kind: LayerKind, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.kind = kind
        d, gain = config.embed_dim, 1.0 / math.sqrt(2 * config.num_layers)  # keeps the residual stream's size (GPT-2)
        options = {"rngs": rngs, "output_gain": gain, "dtype": dtype}
        self.attention_norm = RMSNorm(d, eps=config.norm_eps, dtype=dtype)
        self.attention = DecoderAttention(config.attention, kind, d, norm_eps=config.norm_eps, **options)
        self.feed_forward_norm = RMSNorm(d, eps=config.norm_eps, dtype=dtype)
        if kind.feed_forward is FeedForward.MOE:
            self.feed_forward = Moe(config.moe, d, **options)
        else:
            self.feed_forward = Mlp(d, config.mlp_dim, **options)

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None, dict[str, jax.Array] | None]:
        """x [b t d] in; x, the layer's cache and (of a mixture) the router's statistics out."""
        attended, cache = self.attention(self.attention_norm(x), context, cache)
        x = checkpoint_name(x + attended, "after_attention")
        normed = self.feed_forward_norm(x)
        if self.kind.feed_forward is FeedForward.MOE:
            fed, statistics = self.feed_forward(normed, context.segments != 0)
        else:
            fed, statistics = self.feed_forward(normed), None
        return x + fed, cache, statistics
