"""SwiGLU feed-forward: down(silu(gate(x)) * up(x)). Source: Shazeer 2020, "GLU variants improve Transformer"."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama4_jax.core import partitioning
from llama4_jax.nn.linear import Linear


class Mlp(nnx.Module):
    """x [.. d] in and out; `gate_up.kernel` [d 2 f] holds gate and up side by side: one matmul, one sharded axis f."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, rngs: nnx.Rngs, output_gain: float = 1.0, dtype=jnp.float32):
        self.gate_up = Linear((embed_dim,), (2, mlp_dim), ("embed", "gate_up", "mlp"), rngs=rngs, dtype=dtype)
        self.down = Linear((mlp_dim,), (embed_dim,), ("mlp", "embed"), rngs=rngs, gain=output_gain, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return gated(self.down, checkpoint_name(self.gate_up(x), "shared"))


def gated(down: Callable[[jax.Array], jax.Array], gate_up: jax.Array) -> jax.Array:
    """down(swiglu(gate_up)); on one device the gradient keeps `gate_up` alone, and not what `down` multiplies as well."""
    if partitioning.mesh_in_use() is not None:
        return down(swiglu(gate_up))
    return jax.checkpoint(lambda gate_up: down(_swiglu(gate_up)))(gate_up)


def _swiglu(gate_up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


@jax.checkpoint  # the gradient keeps gate and up, and not three more arrays of their size
def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up of [.. 2 f]."""
    return _swiglu(gate_up)
