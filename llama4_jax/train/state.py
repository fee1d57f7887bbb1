"""What a training run carries from step to step, and the parameters as the forward pass sees them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llama4_jax.core.quantized import QuantizedArray

Params = dict[str, jax.Array]

# Routing compares logits that may differ by less than bfloat16 resolves, and the bias moves by less than it resolves.
_ALWAYS_FLOAT32 = ("router.kernel", "selection_bias")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, besides the batch. All of it is in each checkpoint."""

    step: jax.Array  # [] int32, optimiser steps taken
    params: Params  # master weights by dotted name (core.names), float32
    opt_state: optax.OptState
    rng: jax.Array  # key data; the objective of step i gets fold_in(rng, i)


def create(params: Params, optimizer: optax.GradientTransformation, *, seed: int = 0) -> TrainState:
    """The state before the first step. It shares the arrays of `params`, and the first step takes them over."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def cast(params: Params, dtype) -> Params:
    """Parameters in the compute dtype; router kernels and selection biases stay as they are.

    Modules compute in the dtype of their weights, so this is all that mixed precision takes; the gradients come back
    in the dtype of the master weights.
    """
    return {name: value if name.endswith(_ALWAYS_FLOAT32) else _in(value, dtype) for name, value in params.items()}


def _in(value: jax.Array | QuantizedArray, dtype) -> jax.Array | QuantizedArray:
    if isinstance(value, QuantizedArray):  # of its few bits no dtype loses any; scales are for float32
        return dataclasses.replace(value.astype(dtype), values=value.values.astype(dtype))
    return value.astype(dtype)


def shardings(state: TrainState, places: Mapping[str, NamedSharding]) -> TrainState:
    """Where each array of `state`, which may be abstract, lives: moments as the parameter they belong to, the rest whole.

    places: of the parameters, by name.
    """
    whole = NamedSharding(next(iter(places.values())).mesh, PartitionSpec())

    def place(path, leaf):
        owner = next((name for name in map(_key, reversed(path)) if name in places), None)
        return places[owner] if owner is not None and state.params[owner].shape == leaf.shape else whole

    return jax.tree_util.tree_map_with_path(place, state)


def divided(place: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array lives that has an entry for each block of one at `place`: as that, but whole along axes too short to cut."""

    def part(axes, size: int):
        axes_of = (axes,) if isinstance(axes, str) else axes or ()
        return None if size % math.prod(place.mesh.shape[axis] for axis in axes_of) else axes

    return NamedSharding(place.mesh, PartitionSpec(*map(part, place.spec, shape)))


def _key(entry: Any) -> Any:
    return getattr(entry, "key", None)
