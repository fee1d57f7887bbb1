"""Rotary position embeddings on interleaved pairs: one axis for text, two for images.

A head's dimensions (2j, 2j+1) are one complex number, turned by an angle that grows with position. Checkpoints of
Meta and of Hugging Face both use this order, so neither needs a permutation of q and k.
Source: Su et al. 2021; the `llama3` frequency rule of Llama 3.1; Meta's vision encoder for the 2-D form.
"""

from __future__ import annotations

import math

import einops
import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config import AttentionConfig, RopeScaling, VisionConfig

Turns = tuple[jax.Array, jax.Array]  # cosines and sines of angles [b t head_dim/2]


def frequencies(config: AttentionConfig) -> np.ndarray:
    """Angle per position of each pair, [head_dim / 2] float32, fastest first."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    base = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    return base if config.rope_scaling is None else _stretch(base, config.rope_scaling)


def _stretch(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divides slow frequencies by `factor`, leaves fast ones, and blends between."""
    turns = scaling.original_length * base / np.float32(2 * math.pi)  # full turns within the original context
    if scaling.high_freq_factor > scaling.low_freq_factor:
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
    else:  # Scout: low = high = 1 leaves nothing between to blend
        blend = (turns >= scaling.low_freq_factor).astype(np.float32)
    return ((1 - blend) * base / np.float32(scaling.factor) + blend * base).astype(np.float32)


def text_angles(config: AttentionConfig, positions: jax.Array) -> jax.Array:
    """Angles [b t head_dim/2] in fp32: positions past 2^8 are not exact in bfloat16."""
    return positions[..., None].astype(jnp.float32) * frequencies(config)


def image_angles(config: VisionConfig) -> np.ndarray:
    """Angles [patches + 1, head_dim/2] of a tile's patches in row-major order, the class token (0) last.

    The first half of the pairs turns with x + 1, the second with y + 1; frequencies are those of a head half as wide.
    """
    half = config.head_dim // 2
    speeds = config.rope_theta ** -(np.arange(0, half, 2, dtype=np.float32) / half)
    y, x = np.divmod(np.arange(config.grid**2), config.grid)
    angles = np.concatenate([(x + 1)[:, None] * speeds, (y + 1)[:, None] * speeds], axis=-1)
    return np.concatenate([angles, np.zeros((1, half))]).astype(np.float32)


def turns(angles: jax.Array) -> Turns:
    """What `rotate` multiplies pairs by; taken once, since left to each layer it is taken again for every head."""
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Turns) -> jax.Array:
    """Turns the pairs of x [b t n h] by angles given as `turns`; fp32 inside, x's dtype outside."""
    pairs = einops.rearrange(x.astype(jnp.float32), "... n (h two) -> ... n h two", two=2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    cos, sin = (part[..., None, :] for part in by)  # the same for every head
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return einops.rearrange(turned, "... h two -> ... (h two)").astype(x.dtype)
