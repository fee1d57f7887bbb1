"""The stack of decoder layers: one scanned period of layer kinds, then the leftover layers.

Layers repeat with period lcm(NoPE interval, MoE step). Whole periods are stacked on a leading axis and scanned, so that
compile time does not grow with depth; what is left over, or everything when there is nothing to repeat, is a plain tail.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama4_jax.config import TextConfig, layer_kinds
from llama4_jax.core import parameter
from llama4_jax.model.cache import Cache
from llama4_jax.nn import spread
from llama4_jax.nn.attention import Context
from llama4_jax.nn.block import Block

BLOCK_INPUT = "block_input"  # what a policy that keeps the input of each layer elsewhere calls it


class Decoder(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, scan: bool = True):
        kinds, periods = layer_kinds(config), config.num_layers // config.period
        self.periods = periods if scan and periods > 1 else 0
        scanned = self.periods * config.period

        def stack(kind) -> Block:
            return parameter.stack(lambda rngs: Block(config, kind, rngs=rngs, dtype=dtype), self.periods, rngs)

        self.period = nnx.List([stack(kind) for kind in kinds[: min(scanned, config.period)]])
        self.tail = nnx.List([Block(config, kind, rngs=rngs, dtype=dtype) for kind in kinds[scanned:]])

    def layers(self) -> list[Block]:
        """Every layer, first to last, as a plain block of its own."""
        stacked = [jax.tree.map(lambda leaf, n=n: leaf[n], block) for n in range(self.periods) for block in self.period]
        return [*stacked, *self.tail]

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, remat: bool | Callable | None = None
    ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
        """x [b t d] through all layers; returns x, the cache, and the routers' statistics stacked over MoE layers.

        `remat`: True recomputes each layer in the backward pass, a `jax.checkpoint` policy chooses what to keep.
        """
        cached_period = cache.period if cache else (None,) * len(self.period)
        cached_tail = cache.tail if cache else (None,) * len(self.tail)

        def run(x, block, cache):
            if cache is not None:
                return block(x, context, cache)
            # Without a cache it is training: weights lie in shards that are gathered for the layer and forgotten.
            return spread.marked(block)(checkpoint_name(x, BLOCK_INPUT), context)

        # A plain layer would be merged with its recomputation, and is kept from it. So are layers that share a loop's body: there
        # it also keeps the recomputation of one, and what it gathers, from being made before the gradient of the next is done.
        scan_run, run = (_rematerialised(run, remat, prevent_cse) for prevent_cse in (len(self.period) > 1, True))

        def step(x, period):
            new_caches, statistics = [], []
            for block, layer_cache in zip(*period, strict=True):
                x, layer_cache, layer_statistics = scan_run(x, block, layer_cache)
                new_caches.append(layer_cache)
                statistics += [layer_statistics] if layer_statistics else []
            return x, (tuple(new_caches), statistics)

        new_period, scanned = (), []
        if self.periods:
            x, (new_period, scanned) = jax.lax.scan(step, x, (list(self.period), cached_period))
        new_tail, tail = [], []
        for block, layer_cache in zip(self.tail, cached_tail, strict=True):
            x, layer_cache, layer_statistics = run(x, block, layer_cache)
            new_tail.append(layer_cache)
            tail += [layer_statistics] if layer_statistics else []
        if cache:
            cache = cache.replace(period=new_period, tail=tuple(new_tail))
        return x, cache, _in_layer_order(scanned, tail)


def _rematerialised(run: Callable, remat: bool | Callable | None, prevent_cse: bool) -> Callable:
    """`run`, one layer, which in the backward pass computes again what `remat` does not keep."""
    if not remat:
        return run
    return jax.checkpoint(run, policy=remat if callable(remat) else None, prevent_cse=prevent_cse)


def _in_layer_order(scanned: list[dict], tail: list[dict]) -> dict[str, jax.Array]:
    """Joins statistics [n ..] of the period's mixtures and [..] of the tail's into [l ..], MoE layers in order."""
    parts = []
    if scanned:  # layer n * members + m is member m of repetition n
        parts.append(jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *scanned))
    if tail:
        parts.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *tail))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts) if parts else {}
