"""One optimiser step as one jitted function: gradients over microbatches, a finiteness check, the update.

A step whose loss or gradient is not finite leaves the state exactly as it was and says so in its metrics, so that no
later decision (stop, roll back, save) can find poisoned weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from llama4_jax.config import FeedForward, TextConfig, layer_kinds
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.core.names import Structure, split
from llama4_jax.quant import fake
from llama4_jax.train import optim, qat
from llama4_jax.train.losses import Terms
from llama4_jax.train.state import Params, TrainState, cast, divided, shardings

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Objective = Callable[..., Terms]  # (model, batch, rng) -> Terms


def make(
    structure: Structure,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    text: TextConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state passed in is given up (donated).

    With `config.accumulation` = a > 1, every array of the batch has a leading axis of a microbatches.
    Metrics: loss and the objective's other sums as means over tokens, objective, weight, learning_rate, finite (bool),
    grad_norm, and grad_norm/GROUP for each group of parameters.
    """
    dtype = jnp.dtype(config.compute_dtype)
    learning_rate = optim.schedule(config.optimizer, config.steps)
    rows = selection_rows(structure.names, text) if config.bias_rate else {}
    if config.bias_rate and not rows:
        raise ValueError(
            f"bias_rate={config.bias_rate}, but the model has no selection bias; set moe.selection_bias=true"
        )

    def loss(params: Params, batch: Batch, rng):
        terms = objective(structure.merge(params), batch, rng)
        return terms.loss, terms

    def step(state: TrainState, batch: Batch):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        places = _places(structure, state.params)

        def gradient(params: Params):
            # Cast where they lie: what is gathered is in the compute dtype, and so is what gradients travel and rest in.
            params = _placed(cast(params, dtype), places)
            gradients, terms = _accumulate(jax.grad(loss, has_aux=True), params, batch, rng, config.accumulation)
            return _placed(gradients, places), terms

        gradients, terms = qat.through(gradient, state.params, config.qat, state.step)
        # A batch without a single weighted token is a step without a gradient, not a division by zero.
        weight = jnp.where(terms.weight > 0, terms.weight, 1.0)
        metrics = {name: total / weight for name, total in terms.sums.items()}
        norms = {name: norm / weight for name, norm in gradient_norms(gradients).items()}
        metrics |= {"objective": terms.loss / weight, "weight": terms.weight} | norms
        metrics |= {"learning_rate": learning_rate(state.step)}
        finite = jnp.isfinite(metrics["objective"]) & jnp.isfinite(metrics["grad_norm"])

        def updated(state: TrainState, gradients: Params) -> TrainState:
            gradients = {name: (g / weight).astype(state.params[name].dtype) for name, g in gradients.items()}
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            if rows:
                params |= move_selection_bias(params, metrics["load"], rows, config.bias_rate)
            return _placed_state(TrainState(state.step + 1, params, opt_state, state.rng), places)

        with jax.named_scope("update"):
            # A branch of its own: what the update needs in memory comes after what the gradients needed.
            state = jax.lax.cond(finite, updated, lambda state, _: state, state, gradients)
        return state, metrics | {"finite": finite}

    return jax.jit(step, donate_argnums=0)


def _accumulate(gradient, params: Params, batch: Batch, rng, count: int):
    """Gradients and terms summed over `count` microbatches, one at a time."""
    if count == 1:
        return gradient(params, batch, rng)

    def add(total, microbatch):
        index, arrays = microbatch
        return jax.tree.map(jnp.add, total, gradient(params, arrays, jax.random.fold_in(rng, index))), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(gradient, params, first, rng)
    # In float32 at least: a microbatch may add less than bfloat16 resolves.
    wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf.dtype  # noqa: E731
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf)), shapes)
    return jax.lax.scan(add, zero, (jnp.arange(count), batch))[0]


def _places(structure: Structure, params: Params) -> dict[str, NamedSharding] | None:
    """Where the parameters live on the mesh in use, by name; None without one."""
    mesh = partitioning.mesh_in_use()
    if mesh is None:
        return None
    model = structure.merge(fake.exact(params))
    places = split(partitioning.shardings(model, partitioning.TRAIN, mesh))[1]
    ranges = {name: places[name.removesuffix(fake.RANGE)] for name in params if name.endswith(fake.RANGE)}
    return places | {name: divided(place, params[name].shape) for name, place in ranges.items()}


def _placed(params: Params, places: dict[str, NamedSharding] | None) -> Params:
    """Parameters, or what products see of them: scales lie with their values."""
    if places is None:
        return params

    def place(name: str, leaf):
        return jax.tree.map(
            lambda part: jax.lax.with_sharding_constraint(part, divided(places[name], part.shape)), leaf
        )

    return {name: place(name, leaf) for name, leaf in params.items()}


def _placed_state(state: TrainState, places: dict[str, NamedSharding] | None) -> TrainState:
    """The new state where the old one was: only then can it take over its memory."""
    return state if places is None else jax.lax.with_sharding_constraint(state, shardings(state, places))


def group(name: str) -> str:
    """The group that a parameter is reported under: its module's path without layer numbers."""
    parts = [part for part in name.split(".")[:-1] if not part.isdigit() and part not in ("period", "tail")]
    return ".".join(parts) or name


def gradient_norms(gradients: Params) -> Metrics:
    """L2 norms in float32: `grad_norm` of everything, `grad_norm/GROUP` of each group."""
    squares: dict[str, jax.Array] = {}
    for name, gradient in gradients.items():
        square = jnp.sum(jnp.square(gradient.astype(jnp.float32)))
        squares[group(name)] = squares.get(group(name), 0.0) + square
    norms = {f"grad_norm/{name}": jnp.sqrt(square) for name, square in squares.items()}
    return norms | {"grad_norm": jnp.sqrt(sum(squares.values()))}


def selection_rows(names: Iterable[str], text: TextConfig) -> dict[str, list[int]]:
    """For each selection bias, the rows of `aux["load"]` (mixture layers in order) that its layers own."""
    names = list(names)
    kinds = layer_kinds(text)
    mixtures = [layer for layer, kind in enumerate(kinds) if kind.feed_forward is FeedForward.MOE]
    scanned = any(name.startswith("decoder.period.") for name in names)
    repeats = text.num_layers // text.period if scanned else 0
    rows = {}
    for name in names:
        if not name.endswith("selection_bias"):
            continue
        _, place, index, *_ = name.split(".")
        if place == "period":
            layers = range(int(index), repeats * text.period, text.period)
        else:
            layers = [repeats * text.period + int(index)]
        rows[name] = [mixtures.index(layer) for layer in layers]
    return rows


def move_selection_bias(params: Params, load: jax.Array, rows: dict[str, list[int]], rate: float) -> Params:
    """Selection biases moved by `rate` towards an even load: up for experts below the mean, down for those above.

    load [l e]: share of assignments per mixture layer and expert.
    Source: Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts", algorithm 1.
    """
    direction = jnp.sign(load.mean(-1, keepdims=True) - load)  # [l e]
    moved = {}
    for name, layers in rows.items():
        bias = params[name]  # [n e] stacked, or [e]
        moved[name] = bias + (rate * direction[jnp.asarray(layers)]).reshape(bias.shape).astype(bias.dtype)
    return moved
