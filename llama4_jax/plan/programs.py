"""The real training, prefill and decoding steps, lowered from shapes alone for the devices of any mesh.

Nothing is allocated: the model is abstract, and every argument is a shape with the sharding that the run would give it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama4_jax import infer
from llama4_jax.config import Llama4Config
from llama4_jax.config.train import QatConfig, TrainConfig
from llama4_jax.core import names, partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.infer.options import DECODING
from llama4_jax.model import Cache, Llama4
from llama4_jax.plan import weights
from llama4_jax.plan.compiler import NONE
from llama4_jax.plan.weights import PLAIN, Kept
from llama4_jax.quant import fake
from llama4_jax.quant import recipe as recipes
from llama4_jax.train import losses, optim, state, step

CACHE_AXES = ("batch", "kv_heads", "time", "head_dim")  # of a layer's keys and values


class Step(NamedTuple):
    """A lowered program, its arguments by kind, as shapes that know their shardings, and what the compiler is told of it."""

    lowered: jax.stages.Lowered
    arguments: dict[str, Any]
    options: Mapping[str, str] = NONE


def train(
    config: Llama4Config, train: TrainConfig, mesh: Mesh, *, batch: int, length: int, placement=partitioning.TRAIN
) -> Step:
    """The optimiser step on `batch` rows of `length` text tokens, all microbatches together."""
    structure, params = abstract_params(config, jnp.float32, placement, mesh)
    params |= _ranges(params, train.qat)
    optimizer = optim.make(train.optimizer, train.steps)
    shapes = jax.eval_shape(functools.partial(state.create, optimizer=optimizer), params)
    shapes = placed(shapes, state.shardings(shapes, {name: leaf.sharding for name, leaf in params.items()}))
    objective = functools.partial(losses.next_token, config=train)
    with partitioning.use(mesh, placement):
        advance = step.make(structure, objective, optimizer, train, config.text)
        lowered = advance.lower(shapes, batch_shapes(train.accumulation, batch, length, placement, mesh))
    return Step(lowered, {"parameters": shapes.params, "optimizer": shapes.opt_state})


def prefill(
    config: Llama4Config, mesh: Mesh, *, batch: int, length: int, placement=partitioning.SERVE, kept: Kept = PLAIN
) -> Step:
    """The first call of a generation: `length` tokens of each row into an empty cache, and the last token's logits."""
    return _forward(config, mesh, placement, kept, batch=batch, length=length, new=length)


def decode(
    config: Llama4Config, mesh: Mesh, *, batch: int, length: int, placement=partitioning.SERVE, kept: Kept = PLAIN
) -> Step:
    """One token more for each row, with a cache of `length` slots."""
    return _forward(config, mesh, placement, kept, batch=batch, length=length, new=1)


def _forward(config: Llama4Config, mesh: Mesh, placement: Placement, kept: Kept, *, batch: int, length: int, new: int):
    # Decoding has the layout of `infer.prepare`: in a loop, layers would read the whole cache and write another. A prompt
    # fills the cache but once, and its layers are compiled as one period, which takes minutes less.
    scan = new > 1
    structure, params = abstract_params(config, jnp.bfloat16, placement, mesh, scan=scan, recipe=kept.recipe)
    cache = jax.eval_shape(lambda: _empty_cache(config, batch, length, scan, kept.cache))
    cache = placed(cache, cache_shardings(cache, placement, mesh))
    tokens = jax.ShapeDtypeStruct(
        (batch, new), jnp.int32, sharding=partitioning.batch_sharding((batch, new), placement, mesh)
    )

    def run(params, tokens, cache):
        model = structure.merge(params)
        out = model.hidden(tokens, cache=cache)
        return model.unembed(out.hidden[:, -1]), out.cache

    with partitioning.use(mesh, placement):
        caches = jax.tree.map(lambda leaf: leaf.sharding, cache)
        # A chip that serves holds the vision tower too, which text does not visit.
        jitted = jax.jit(run, donate_argnums=2, out_shardings=(None, caches), keep_unused=True)
        lowered = jitted.lower(params, tokens, cache)
    return Step(lowered, {"parameters": params, "cache": cache}, DECODING["tpu"] if new == 1 else NONE)


def abstract_params(config: Llama4Config, dtype, placement: Placement, mesh: Mesh, *, scan: bool = True, recipe=None):
    """The structure of the model, and the shape and sharding of each parameter by name; without `scan` laid out for decoding."""
    model = weights.abstract(config, recipe, dtype=dtype, scan=scan)
    if not scan:
        with partitioning.use(mesh, placement):
            model = jax.eval_shape(infer.prepare, model)
    structure, params = names.split(model)
    return structure, placed(params, names.split(partitioning.shardings(model, placement, mesh))[1])


def _ranges(params: dict, config: QatConfig) -> dict:
    """The ranges that are trained beside `params`, as `train.qat.prepared` adds them."""
    if not config.recipe or config.ranges != "learned":
        return {}
    specs = recipes.specs(params, config.preset)
    ranges = jax.eval_shape(lambda: fake.learned(params, specs))
    owners = {name: params[name.removesuffix(fake.RANGE)].sharding for name in ranges}
    return placed(ranges, {name: state.divided(owners[name], leaf.shape) for name, leaf in ranges.items()})


def placed(shapes, places):
    """Shapes with shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def batch_shapes(accumulation: int, batch: int, length: int, placement: Placement, mesh: Mesh) -> dict:
    """What a loader of packed text gives, cut over the mesh; with accumulation a leading axis of microbatches."""
    if batch % accumulation:
        raise ValueError(
            f"batch={batch} does not cut into accumulation={accumulation} microbatches; use a divisor of it"
        )
    rows = (batch // accumulation, length)
    spec = partitioning.batch_sharding(rows, placement, mesh).spec
    leading = (accumulation,) if accumulation > 1 else ()
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * len(leading), *spec))
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32) | {"loss_weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(leading + rows, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def cache_shardings(cache: Cache, placement: Placement, mesh: Mesh) -> Cache:
    """Rows of a cache as the batch, heads as the placement says, and slots where it cuts time; scales as what they scale."""

    def place(leaf):
        axes = ("batch",) if leaf.ndim == 1 else ("layers",) * (leaf.ndim - 4) + CACHE_AXES
        return partitioning.sharding(axes, leaf.shape, placement, mesh)

    return jax.tree.map(place, cache)


def _empty_cache(config: Llama4Config, batch: int, length: int, scan: bool, dtype: str) -> Cache:
    return Llama4(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, scan=scan).init_cache(batch, length, dtype)
