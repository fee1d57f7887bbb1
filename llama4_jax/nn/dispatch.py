"""Tokens to rows sorted by expert, and the experts' rows back to tokens: what a mixture does on any one device.

The router's score multiplies the expert's INPUT, which is not the same as multiplying its output: SwiGLU is not linear.
Source: `Llama4TextMoe` in transformers, which computes every expert for every token; here tokens are sorted by expert
and each is multiplied by the weights of its own experts only (MegaBlocks, Gale et al. 2022).
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
from flax import struct

from llama4_jax.nn.router import Routing


@struct.dataclass
class Sorting:
    """The permutation [t k] that sorts a token's choices by expert, its inverse, and the rows of each expert [e].

    Padding goes to no expert: it sorts behind all groups, where rows cost nothing and give 0.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


def sort(experts: jax.Array, present: jax.Array, num_experts: int) -> Sorting:
    """Of the experts chosen [t k] by tokens that are present [t]."""
    experts = jnp.where(present[:, None], experts, num_experts).reshape(-1)
    order = jnp.argsort(experts, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return Sorting(order, inverse, jnp.zeros(num_experts, jnp.int32).at[experts].add(1, mode="drop"))


def rows_of(x: jax.Array, scores: jax.Array, sorting: Sorting) -> jax.Array:
    """Tokens x [t d] times each of their scores [t k], sorted by expert: [(t k) d]."""
    inputs = einops.rearrange(_scaled(x, scores), "t k d -> (t k) d")
    return permute(inputs, sorting.order, sorting.inverse)


def tokens_of(rows: jax.Array, sorting: Sorting, top_k: int) -> jax.Array:
    """Sums over the experts of each token, [t d], of sorted rows [(t k) d]."""
    outputs = einops.rearrange(permute(rows, sorting.inverse, sorting.order), "(t k) d -> t k d", k=top_k)
    return jnp.sum(outputs, axis=1)


def mixture(experts, x: jax.Array, routing: Routing, present: jax.Array, num_experts: int) -> tuple:
    """The routed experts' output [t d] for tokens x [t d], present [t], and the number of rows that experts saw.

    experts: called with sorted rows and the rows of each expert, such as `moe.Experts`.
    """
    with jax.named_scope("dispatch"):
        sorting = sort(routing.experts, present, num_experts)
        rows = rows_of(x, routing.scores, sorting)
    with jax.named_scope("experts"):
        rows = experts(rows, sorting.group_sizes)
    with jax.named_scope("combine"):
        return tokens_of(rows, sorting, routing.experts.shape[1]), jnp.sum(sorting.group_sizes)


@jax.checkpoint  # the gradient keeps x, which the router and the shared expert keep as well, and no copies of it
def _scaled(x: jax.Array, scores: jax.Array) -> jax.Array:
    """x [t d] times each of its scores [t k]: [t k d]."""
    return x[:, None] * scores[..., None]


@jax.custom_vjp
def permute(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """rows[order], whose gradient is a gather by the inverse permutation and not a scatter."""
    return rows[order]


def _permute_forward(rows, order, inverse):
    return rows[order], inverse


def _permute_backward(inverse, gradient):
    return gradient[inverse], None, None


permute.defvjp(_permute_forward, _permute_backward)
