"""Parameters: initial values and the logical names of their axes.

The names say what an axis means (embed, heads, mlp ...), never where it lives; a placement table maps them to a mesh.
Axis names: vocab; embed, expert_embed and vision_embed, the residual stream as dense layers, routed experts and the vision
tower read it; heads, kv_heads, head_dim, gate_up, mlp; experts, and choices for experts as the router sees them; patch;
rank (of adapters); layers, of stacked blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def kernel(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], *, fan_in: int, gain: float = 1.0, dtype=jnp.float32
) -> nnx.Param:
    """A weight drawn from a truncated normal of standard deviation `gain / sqrt(fan_in)`."""
    deviation = gain / math.sqrt(fan_in)
    # Cut at two sigmas: 0.87962566 is the deviation that is left of a unit normal.
    value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, tuple(shape), jnp.float32) * (deviation / 0.87962566)
    return named(value.astype(dtype), axes)


def constant(value: float, shape: Sequence[int], axes: Sequence[str], *, dtype=jnp.float32) -> nnx.Param:
    """A parameter that starts at the same number everywhere: norm scales at 1, biases at 0."""
    return named(jnp.full(tuple(shape), value, dtype), axes)


def named(value: jax.Array, axes: Sequence[str]) -> nnx.Param:
    """Wraps `value` with one logical axis name for each of its dimensions."""
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} needs {value.ndim} axis names, got {tuple(axes)}")
    return nnx.Param(value, axes=tuple(axes))


def stack(make: Callable[[nnx.Rngs], nnx.Module], number: int, rngs: nnx.Rngs) -> nnx.Module:
    """`number` modules that `make` makes, each with its own random keys, as one whose parameters start with "layers"."""
    keys = jax.random.split(rngs.params(), number)
    stacked = jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return jax.tree.map(lambda leaf: named(leaf[...], ("layers", *leaf.axes)), stacked, is_leaf=is_param)
