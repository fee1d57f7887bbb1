"""Quantisation-aware training as part of a step: which rounding products see when, and gradients back through it.

A step sees its number, so that one compiled program does the whole schedule: first no rounding, then eight bits, then the
recipe's own. Master weights stay in full precision, and a checkpoint holds nothing but them and the learned ranges. Keys and
values are no parameters: what is traced under `cached` attends to them as an int8 cache holds them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llama4_jax.config.quant import QuantSpec
from llama4_jax.config.train import QatConfig
from llama4_jax.nn.attention import CACHED_AS
from llama4_jax.quant import fake, recipe
from llama4_jax.train.state import Params, divided


def prepared(params: Params, config: QatConfig) -> Params:
    """What is trained: `params`, and where `config` says so a range beside each that is rounded, divided as it is."""
    if not config.recipe or config.ranges != "learned":
        return params
    ranges = fake.learned(params, _specs(params, config))
    for name in ranges:
        place = params[name.removesuffix(fake.RANGE)].sharding
        if isinstance(place, NamedSharding):
            ranges[name] = jax.device_put(ranges[name], divided(place, ranges[name].shape))
    return params | ranges


def seen(params: Params, config: QatConfig, step: int) -> fake.Params:
    """The model's parameters as products of step `step` see them; `params` itself without a recipe."""
    if not config.recipe:
        return params
    return fake.exact(params) if step < config.start else _rounded(params, config, step)


@contextlib.contextmanager
def cached(config: QatConfig, step: int) -> Iterator[None]:
    """Rounds keys and values as those of step `step` are rounded, in what is traced in the block without a cache."""
    with CACHED_AS(config.cache if step >= config.start else None):
        yield


def packed(params: Params, config: QatConfig) -> fake.Params:
    """The trained model's parameters in few bits; `params` itself without a recipe."""
    return fake.packed(params, _specs(params, config)) if config.recipe else params


def through(gradient: Callable, params: Params, config: QatConfig, step: jax.Array) -> tuple[Params, object]:
    """`gradient` of what products see of `params` at step [] int32, pulled back to `params`.

    gradient: parameters as `seen` to their gradients and anything else, which is passed on.
    Where inputs, or keys and values, are rounded as well, and not from the start, the program has the model twice: such
    rounding is part of what the program is, and no number that could be chosen.
    """
    if not config.rounds:
        return gradient(params)

    def with_cache(view):
        with cached(config, config.start):
            return gradient(view)

    rounded = functools.partial(_pulled, with_cache, functools.partial(_rounded, config=config, step=step))
    if not _late_inputs(params, config):
        return rounded(params)
    return jax.lax.cond(step < config.start, functools.partial(_pulled, gradient, fake.exact), rounded, params)


def _pulled(gradient: Callable, see: Callable[[Params], fake.Params], params: Params):
    # Computed again rather than kept: what rounding keeps for its gradient is several times the parameters.
    view, pull = jax.vjp(jax.checkpoint(see), params)
    gradients, rest = gradient(view)
    leaves = [g.astype(s.dtype) for g, s in zip(jax.tree.leaves(gradients), jax.tree.leaves(view), strict=True)]
    return pull(jax.tree.unflatten(jax.tree.structure(view), leaves))[0], rest


def _rounded(params: Params, config: QatConfig, step: int | jax.Array) -> fake.Params:
    specs = _specs(params, config)
    if config.ranges == "learned" and (missing := [name for name in specs if name + fake.RANGE not in params]):
        raise ValueError(
            f"ranges='learned', but there is no {missing[0]}{fake.RANGE}; add them with train.qat.prepared"
        )
    view = fake.fake(params, specs)
    if config.gradual:
        view = _chosen(step < config.start + config.gradual, fake.fake(params, _eight_bits(specs)), view)
    if config.start and not _late_inputs(params, config):
        view = _chosen(step < config.start, fake.exact(params), view)
    return view


def _chosen(first: bool | jax.Array, one: fake.Params, other: fake.Params) -> fake.Params:
    return jax.tree.map(functools.partial(jnp.where, first), one, other)


def _late_inputs(params: Params, config: QatConfig) -> bool:
    """Whether rounding sets in later, and that of inputs, or of keys and values, with it."""
    inputs = any(spec.activations for spec in _specs(params, config).values())
    return bool(config.start) and (inputs or config.cache is not None)


def _eight_bits(specs: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
    wider = {"int4": "int8"}
    return {name: dataclasses.replace(spec, values=wider.get(spec.values, spec.values)) for name, spec in specs.items()}


def _specs(params: Params, config: QatConfig) -> dict[str, QuantSpec]:
    return recipe.specs(fake.exact(params), config.preset) if config.recipe else {}
