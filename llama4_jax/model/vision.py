"""The vision tower: a tile of pixels becomes a few tokens of the decoder's width.

Patches, class token last, learned and 2-D rotary positions, the encoder, pixel shuffle, and a two-layer adapter with a
GELU after each layer, the last one included.
Source: Meta's Llama 4 vision encoder; `Llama4VisionModel` and `Llama4MultiModalProjector` in transformers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config import VisionConfig
from llama4_jax.core import parameter
from llama4_jax.nn import rope
from llama4_jax.nn.linear import Linear
from llama4_jax.nn.norm import LayerNorm
from llama4_jax.nn.patch import patchify, pixel_shuffle
from llama4_jax.nn.vit import VisionBlock


class Adapter(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        shuffled, out = config.embed_dim * config.shuffle**2, config.output_dim
        self.fc1 = Linear((shuffled,), (out,), ("vision_embed", "mlp"), rngs=rngs, dtype=dtype)
        self.fc2 = Linear((out,), (out,), ("mlp", "vision_embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.fc1, self.fc2):
            x = jax.nn.gelu(layer(x), approximate=False)
        return x


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, text_dim: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        d, options = config.embed_dim, {"rngs": rngs, "dtype": dtype}
        self.patch = Linear((config.patch_dim,), (d,), ("patch", "vision_embed"), **options)
        self.class_embedding = parameter.kernel(rngs, (d,), ("vision_embed",), fan_in=d, dtype=dtype)
        self.position_embedding = parameter.kernel(
            rngs, (config.grid**2 + 1, d), ("patch", "vision_embed"), fan_in=d, dtype=dtype
        )
        self.norm_pre, self.norm_post = LayerNorm(d, dtype=dtype), LayerNorm(d, dtype=dtype)
        make_block = lambda rngs: VisionBlock(config, rngs=rngs, dtype=dtype)  # noqa: E731
        self.blocks = parameter.stack(make_block, config.num_layers, rngs)
        self.adapter = Adapter(config, **options)
        self.projector = Linear((config.output_dim,), (text_dim,), ("mlp", "embed"), **options)

    def encode(self, images: jax.Array, remat: bool = False) -> jax.Array:
        """images [n h w c] in [-1, 1] to patch features [n p d], after the last norm and without the class token."""
        dtype = self.patch.kernel.dtype
        patches = self.patch(patchify(images.astype(dtype), self.config.patch_size))  # [n p d]
        class_token = jnp.broadcast_to(self.class_embedding[...], (patches.shape[0], 1, patches.shape[2]))
        x = jnp.concatenate([patches, class_token], axis=1) + self.position_embedding[...]
        turns = rope.turns(rope.image_angles(self.config)[None])  # [1 p+1 h/2] each

        def layer(x, block):
            return block(x, turns), None

        # A loop's body cannot be merged with its recomputation.
        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False) if remat else layer, self.norm_pre(x), self.blocks)
        return self.norm_post(x)[:, :-1]

    def __call__(self, images: jax.Array, remat: bool = False) -> jax.Array:
        """images [n h w c] to features [n tokens_per_tile text_dim].

        remat: keep each layer's input for the backward pass, and compute the rest of the layer again there.
        """
        self._check(images)
        with jax.named_scope("vision"):
            shuffled = pixel_shuffle(self.encode(images, remat), self.config.grid, self.config.shuffle)
            return self.projector(self.adapter(shuffled))

    def _check(self, images: jax.Array) -> None:
        side, channels = self.config.image_size, self.config.channels
        if images.ndim != 4 or images.shape[1:] != (side, side, channels):
            raise ValueError(
                f"images must be tiles [n {side} {side} {channels}] in [-1, 1], got shape {images.shape}; "
                "cut pictures into tiles first"
            )
