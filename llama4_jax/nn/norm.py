"""RMS norm of the decoder and layer norm of the vision encoder: fp32 inside, the input's dtype outside.

Source: Zhang & Sennrich 2019 (RMS norm); Ba et al. 2016 (layer norm); Llama 4 casts back before it multiplies by the
scale, which is visible in bfloat16.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.core import parameter


@partial(jax.checkpoint, static_argnums=1)  # the gradient keeps x alone
def rms_normalize(x: jax.Array, eps: float, scale: jax.Array | None = None) -> jax.Array:
    """Divides the last axis by its root mean square, then multiplies it by `scale` if there is one."""
    x32 = x.astype(jnp.float32)  # squares of bf16 numbers would lose half their digits
    normal = (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return normal if scale is None else normal * scale.astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, *, eps: float, dtype=jnp.float32):
        self.eps = eps
        self.scale = parameter.constant(1.0, (dim,), ("embed",), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalize(x, self.eps, self.scale[...])


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, *, eps: float = 1e-5, dtype=jnp.float32):
        self.eps = eps
        self.scale = parameter.constant(1.0, (dim,), ("vision_embed",), dtype=dtype)
        self.bias = parameter.constant(0.0, (dim,), ("vision_embed",), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scaled = normal * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return scaled.astype(x.dtype)
