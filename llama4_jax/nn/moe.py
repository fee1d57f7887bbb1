"""Mixture of experts: a shared expert for every token plus its top-k routed experts, none ever dropped.

How tokens reach their experts is `dispatch` on one device and `expert_parallel` on a mesh.
Source: `Llama4TextMoe` in transformers.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config import MoeConfig
from llama4_jax.core import parameter, partitioning
from llama4_jax.kernels import few_rows
from llama4_jax.nn import dispatch, expert_parallel, matrices, products
from llama4_jax.nn.mlp import Mlp, gated, swiglu
from llama4_jax.nn.router import Router


class Experts(nnx.Module):
    """The routed experts' weights: `gate_up` [e d 2 f] and `down` [e f d]."""

    def __init__(self, config: MoeConfig, embed_dim: int, *, rngs: nnx.Rngs, output_gain: float, dtype=jnp.float32):
        e, f = config.num_experts, config.expert_dim
        axes = ("experts", "expert_embed", "gate_up", "mlp")
        self.gate_up = parameter.kernel(rngs, (e, embed_dim, 2, f), axes, fan_in=embed_dim, dtype=dtype)
        self.down = parameter.kernel(
            rngs, (e, f, embed_dim), ("experts", "mlp", "expert_embed"), fan_in=f, gain=output_gain, dtype=dtype
        )

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """rows [m d] sorted by expert, group_sizes [e] rows of each; rows past their sum give 0."""
        gate_up = products.grouped(rows, self.gate_up, group_sizes)  # [m 2 f]
        return gated(lambda hidden: products.grouped(hidden, self.down, group_sizes), gate_up)


class MatrixExperts(nnx.Module):
    """`Experts` for decoding, each a pair of matrices; see `matrices`."""

    def __init__(self, experts: Experts):
        self.gate_up, self.hidden = matrices.lay_out(experts.gate_up, 1, leading=1)
        self.down, self.outputs = matrices.lay_out(experts.down, 1, leading=1)

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        hidden = swiglu(self.hidden.rows(products.grouped(rows, self.gate_up, group_sizes)))
        return self.outputs.rows(products.grouped(hidden, self.down, group_sizes))


class TransposedExperts(nnx.Module):
    """`Experts` for decoding on a CPU, each matrix transposed (see `kernels.few_rows`): [e 2f d] and [e d f]."""

    def __init__(self, experts: Experts):
        self.activations = tuple(products.activations(kernel[...]) for kernel in (experts.gate_up, experts.down))
        self.gate_up, self.down = (nnx.Param(_transposed(kernel[...])) for kernel in (experts.gate_up, experts.down))

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        hidden = few_rows.grouped(rows, self.gate_up[...], group_sizes, self.activations[0])
        hidden = swiglu(einops.rearrange(hidden, "m (two f) -> m two f", two=2))
        return few_rows.grouped(hidden, self.down[...], group_sizes, self.activations[1])


def _transposed(kernel: products.Weight) -> jax.Array | few_rows.Packed:
    """Each matrix of [e k n..] as [e n k]."""
    if few_rows.can_pack(kernel):
        return few_rows.pack(kernel, 1, leading=1)
    kernel = products.floats(kernel, kernel.dtype)
    return kernel.reshape(*kernel.shape[:2], -1).swapaxes(1, 2)


class Moe(nnx.Module):
    """x [b t d] and present [b t] bool in; the mixture's output [b t d] and the router's statistics out."""

    def __init__(
        self, config: MoeConfig, embed_dim: int, *, rngs: nnx.Rngs, output_gain: float = 1.0, dtype=jnp.float32
    ):
        self.config = config
        self.router = Router(config, embed_dim, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, embed_dim, rngs=rngs, output_gain=output_gain, dtype=dtype)
        self.shared = Mlp(embed_dim, config.expert_dim, rngs=rngs, output_gain=output_gain, dtype=dtype)

    def __call__(self, x: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat, flat_present = einops.rearrange(x, "b t d -> (b t) d"), present.reshape(-1)
        mesh = partitioning.mesh_in_use()
        if mesh is None:
            with jax.named_scope("route"):
                routing, statistics = self.router(flat, flat_present)
            routed, seen = dispatch.mixture(self.experts, flat, routing, flat_present, self.config.num_experts)
            fed = (self.shared(flat) + routed).reshape(x.shape)
        else:  # rows and time stay as they are spread: flat, they would have to move
            with jax.named_scope("route"):
                routing, statistics = self.router(x, present)
            routed, seen = expert_parallel.mixture(mesh, self.experts, x, routing, present, self.config.num_experts)
            fed = self.shared(x) + routed
        assigned = jnp.sum(present) * self.config.top_k
        statistics["dropped"] = (assigned - seen).astype(jnp.float32)
        return fed, statistics
