"""Optimiser: clipping, AdamW or Muon, decoupled weight decay, and a schedule that depends on the step alone.

A parameter's role follows from the last part of its name, never from its rank: a norm's scale stacked over layers is
two-dimensional and still no matrix.

Source: Loshchilov and Hutter 2019 (AdamW); Jordan 2024 and Liu et al. 2025, arXiv:2502.16982 (Muon, and the scale that
gives its update AdamW's root mean square).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llama4_jax.config.train import OptimizerConfig


class Role(enum.Enum):
    """How the optimiser treats a parameter."""

    MATRIX = "matrix"  # projections: decayed; by Muon if chosen
    EDGE = "edge"  # projections at the model's edges, the router, factors of adapters: decayed, never by Muon
    EMBEDDING = "embedding"  # rows looked up: decay would shrink the rows that are rarely seen
    VECTOR = "vector"  # scales, biases and learned ranges
    FROZEN = "frozen"  # moved by something other than gradients


_ROLES = {
    "kernel": Role.MATRIX,
    "gate_up": Role.MATRIX,
    "down": Role.MATRIX,
    "lora_a": Role.EDGE,
    "lora_b": Role.EDGE,
    "table": Role.EMBEDDING,
    "class_embedding": Role.EMBEDDING,
    "position_embedding": Role.EMBEDDING,
    "scale": Role.VECTOR,
    "range": Role.VECTOR,
    "bias": Role.VECTOR,
    "selection_bias": Role.FROZEN,
}
_EDGES = ("head.kernel", "router.kernel", "patch.kernel")


def role(name: str) -> Role:
    """The role of the parameter called `name`; raises ValueError for a name that no rule covers."""
    if name.endswith(_EDGES):
        return Role.EDGE
    last = name.rsplit(".", 1)[-1]
    if last not in _ROLES:
        raise ValueError(f"no optimiser rule for parameter {name!r}: its last part must be one of {', '.join(_ROLES)}")
    return _ROLES[last]


def schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate at a step: linear warm-up, then half a cosine down to `final_fraction` at step `steps`."""
    warmup = min(config.warmup_steps, steps)

    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        share = config.final_fraction + (1.0 - config.final_fraction) * cosine
        return config.learning_rate * share * jnp.minimum(1.0, (step + 1.0) / max(warmup, 1))

    return learning_rate


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `steps` steps, for flat dicts of parameters (see `core.names`)."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    rules = {"adam": adam, "frozen": optax.set_to_zero()}
    if config.name == "muon":
        rules["muon"] = optax.chain(
            scale_by_muon(beta=config.momentum, weight_dimension_numbers=_matrix_axes), _rms(config.muon_rms)
        )

    def labels(params):
        return {name: _label(role(name), config.name) for name in params}

    def decayed(params):
        return {name: role(name) in (Role.MATRIX, Role.EDGE) for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(rules, labels),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _label(role: Role, optimizer: str) -> str:
    if role is Role.FROZEN:
        return "frozen"
    return "muon" if optimizer == "muon" and role is Role.MATRIX else "adam"


def _matrix_axes(updates: dict) -> dict:
    """For each matrix, which axes are inputs and outputs; the others (layers, experts, gate and up) are batch."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _axes(path[0].key), updates)


def _axes(name: str) -> MuonDimensionNumbers:
    parts = name.split(".")
    owner = parts[-2] if parts[-1] == "kernel" else parts[-1]
    if owner in ("query", "key", "value"):  # [d n h]
        return MuonDimensionNumbers(reduction_axis=(-3,), output_axis=(-2, -1))
    if owner == "output":  # [n h d]
        return MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=(-1,))
    if owner == "gate_up":  # [d 2 f]: two matrices that share nothing but their input
        return MuonDimensionNumbers(reduction_axis=(-3,), output_axis=(-1,))
    return MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,))  # [in out]


def _rms(target: float) -> optax.GradientTransformation:
    """Scales an orthogonal matrix, of entries about 1/sqrt(longer side), to root mean square `target`."""

    def scale(path, update):
        axes = _axes(path[0].key)
        sides = [math.prod(update.shape[axis] for axis in side) for side in axes]
        return update * (target * math.sqrt(max(sides)))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))
