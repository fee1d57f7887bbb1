"""The vision encoder's layer: layer norm, bidirectional attention with 2-D RoPE, exact-GELU MLP, biases throughout.

Source: Meta's Llama 4 vision encoder; `Llama4VisionEncoderLayer` in transformers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config import VisionConfig
from llama4_jax.kernels import attention as kernels
from llama4_jax.nn import rope, spread
from llama4_jax.nn.linear import Linear, together
from llama4_jax.nn.norm import LayerNorm


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        d, n, h = config.embed_dim, config.num_heads, config.head_dim
        axes, options = ("vision_embed", "heads", "head_dim"), {"rngs": rngs, "bias": True, "dtype": dtype}
        self.query = Linear((d,), (n, h), axes, **options)
        self.key = Linear((d,), (n, h), axes, **options)
        self.value = Linear((d,), (n, h), axes, **options)
        self.output = Linear((n, h), (d,), ("heads", "head_dim", "vision_embed"), **options)

    def __call__(self, x: jax.Array, turns: rope.Turns) -> jax.Array:
        """x [tiles patches+1 d]; every position sees every other."""
        query, key, value = together(x, self.query, self.key, self.value)
        return self.output(self._attend(rope.rotate(query, turns), rope.rotate(key, turns), value))

    def _attend(self, *arrays: jax.Array) -> jax.Array:
        mesh = spread.mesh_of(self.query.kernel)
        if mesh is None:
            return kernels.attend_all(*arrays)
        heads = spread.result(self.query.kernel, num_inputs=1)
        return jax.shard_map(kernels.attend_all, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads)(*arrays)


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        d, f, options = config.embed_dim, config.mlp_dim, {"rngs": rngs, "bias": True, "dtype": dtype}
        self.attention_norm = LayerNorm(d, dtype=dtype)
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(d, dtype=dtype)
        self.fc1 = Linear((d,), (f,), ("vision_embed", "mlp"), **options)
        self.fc2 = Linear((f,), (d,), ("mlp", "vision_embed"), **options)

    def __call__(self, x: jax.Array, turns: rope.Turns) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), turns)
        hidden = jax.nn.gelu(self.fc1(self.mlp_norm(x)), approximate=False)  # the tanh form is off by 0.006 in logits
        return x + self.fc2(hidden)
