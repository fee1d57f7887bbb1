"""Top-k routing with sigmoid scores, and what one wants to know about it.

The score of a chosen expert is the sigmoid of its own logit: scores are neither renormalised nor a softmax.
Source: `Llama4Router` in transformers. The statistics and losses are ours, and off in the reference:
  balance loss  E * sum_e load_e * mean_t(sigmoid_e / sum_e sigmoid_e)  (Switch Transformer's loss, on sigmoid scores)
  z-loss        mean_t logsumexp(logits)^2                              (ST-MoE, Zoph et al. 2022)
  selection bias, which moves the choice but not the score              (Wang et al. 2024, auxiliary-loss-free balance)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, struct

from llama4_jax.config import MoeConfig
from llama4_jax.core import parameter
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.nn import products


@struct.dataclass
class Routing:
    """experts [.. k] int32, the chosen ones; scores [.. k] in the activations' dtype, in (0, 1)."""

    experts: jax.Array
    scores: jax.Array


class Router(nnx.Module):
    """x [.. d] in; Routing and statistics out. Computes in the dtype of its kernel: keep it fp32 for training."""

    def __init__(self, config: MoeConfig, embed_dim: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        shape, axes = (embed_dim, config.num_experts), ("embed", "choices")
        self.kernel = parameter.kernel(rngs, shape, axes, fan_in=embed_dim, dtype=dtype)
        bias = parameter.constant(0.0, (config.num_experts,), ("choices",)) if config.selection_bias else None
        self.selection_bias = bias

    def __call__(self, x: jax.Array, present: jax.Array) -> tuple[Routing, dict[str, jax.Array]]:
        """`present` [..] bool tells tokens from padding, which counts in no statistic."""
        logits = self._logits(x.astype(self.kernel.dtype))  # [.. e]
        if self.selection_bias is None:
            # The order of logits is that of their sigmoids, which saturate and would tie.
            chosen, experts = jax.lax.top_k(logits, self.config.top_k)
        else:
            sigmoids = jax.nn.sigmoid(logits.astype(jnp.float32))
            steered = sigmoids + jax.lax.stop_gradient(self.selection_bias[...])
            experts = jax.lax.top_k(steered, self.config.top_k)[1]
            chosen = jnp.take_along_axis(logits, experts, axis=-1)
        scores = jax.nn.sigmoid(chosen.astype(jnp.float32)).astype(x.dtype)
        return Routing(experts=experts, scores=scores), statistics(logits, experts, present)

    def _logits(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        return products.dense(x, kernel).astype(x.dtype) if isinstance(kernel, QuantizedArray) else x @ kernel


def statistics(logits: jax.Array, experts: jax.Array, present: jax.Array) -> dict[str, jax.Array]:
    """Router health over the tokens present, fp32.

    load [e]: share of all assignments that each expert gets (sums to 1); max_load: the largest times e (1 is even);
    dead: experts that got nothing; entropy: mean entropy of a token's normalised scores, in nats;
    balance_loss, z_loss: see the top of this file.
    """
    num_experts = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    weight = present.astype(jnp.float32)  # [..]
    tokens = jnp.maximum(jnp.sum(weight), 1.0)

    def total(values):  # over tokens, [..] or [.. e]
        return jnp.tensordot(weight, values, axes=weight.ndim)

    chosen = jax.nn.one_hot(experts, num_experts).sum(axis=-2)  # [.. e]
    counts = total(chosen)
    load = counts / jnp.maximum(jnp.sum(counts), 1.0)
    sigmoids = jax.nn.sigmoid(logits)
    share = sigmoids / (jnp.sum(sigmoids, axis=-1, keepdims=True) + 1e-20)  # [.. e]
    mean_share = total(share) / tokens
    entropy = -jnp.sum(share * jnp.log(share + 1e-20), axis=-1)
    return {
        "load": load,
        "max_load": jnp.max(load) * num_experts,
        "dead": jnp.sum(counts == 0).astype(jnp.float32),
        "entropy": total(entropy) / tokens,
        "balance_loss": num_experts * jnp.sum(load * mean_share),
        "z_loss": total(jnp.square(jax.nn.logsumexp(logits, axis=-1))) / tokens,
    }
