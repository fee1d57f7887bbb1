"""Bytes of a model's weights, part by part, as they are or as a recipe keeps them: what is held, and what a step reads.

Counted over the shapes of the real parameters, so that scales, and weights that a recipe leaves alone, are counted as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config import Llama4Config
from llama4_jax.config.quant import QuantRecipe
from llama4_jax.core import names, quantized
from llama4_jax.model import Llama4, accounting
from llama4_jax.quant import forms, recipe

# The first of these that a parameter's dotted name contains says which part it belongs to.
_PARTS = {
    "vision.": "vision",
    "embed.table": "embedding",
    "head.": "unembedding",
    ".attention.": "attention",
    ".experts.": "routed_experts",
    ".shared.": "shared_experts",
    ".router.": "router",
    ".feed_forward.": "dense",
}
PARTS = (*_PARTS.values(), "norms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """How a model that serves is kept: the recipe of its weights, bfloat16 without one, and the dtype of its cache."""

    recipe: QuantRecipe | None = None
    cache: str = "bfloat16"

    @property
    def weights(self) -> str:
        return self.recipe.name if self.recipe else "bf16"

    @property
    def name(self) -> str:
        return self.weights + (f", {self.cache} cache" if self.cache != "bfloat16" else "")


PLAIN = Kept()


@functools.lru_cache(maxsize=64)
def by_part(config: Llama4Config, low: QuantRecipe | None = None) -> Mapping[str, float]:
    """Bytes of each of `PARTS`, in bfloat16 where `low` keeps nothing in fewer bits. Raises ValueError as `recipe.specs`."""
    params = names.split(abstract(config))[1]
    specs = recipe.specs(params, low) if low else {}
    found = Counter(dict.fromkeys(PARTS, 0.0))
    for name, leaf in params.items():
        bits = 16 * leaf.size
        if name in specs:
            spec, inputs = specs[name], forms.inputs_of(name, leaf.ndim)
            scales = math.prod(quantized.scales_shape(leaf.shape, inputs, spec.group))
            per_scale = jax.dtypes.itemsize_bits(jnp.dtype(spec.scales)) * (1 if spec.symmetric else 2)
            bits = spec.bits * leaf.size + per_scale * scales
        found[_part(name)] += bits / 8
    return found


def abstract(config: Llama4Config, low: QuantRecipe | None = None, *, dtype=jnp.bfloat16, scan: bool = True) -> Llama4:
    """The model as shapes, with the weights that `low` names in few bits."""
    model = jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), dtype=dtype, scan=scan))
    if low is None:
        return model
    structure, params = names.split(model)
    specs = recipe.specs(params, low)

    def quantise(params):
        kept = {
            name: quantized.quantize(leaf, specs[name], forms.inputs_of(name, leaf.ndim)) if name in specs else leaf
            for name, leaf in params.items()
        }
        return structure.merge(kept)

    return jax.eval_shape(quantise, params)


def read(config: Llama4Config, low: QuantRecipe | None, tokens: int, experts_apart: int = 1) -> tuple[float, float]:
    """Bytes that a step over `tokens` tokens reads of all weights but routed experts, and of these on the busiest device.

    Embeddings are looked up, a row a token, which is nothing; text does not visit the vision tower. experts_apart: devices
    that share the experts out, each reading those of its own that any token visits.
    """
    part, moe = by_part(config, low), config.text.moe
    unread = part["vision"] + (0 if config.text.tie_embeddings else part["embedding"])
    dense = sum(part.values()) - part["routed_experts"] - unread
    if not part["routed_experts"]:
        return dense, 0.0
    busiest = max(1.0, visited(moe.num_experts, moe.top_k, tokens) / experts_apart)
    return dense, part["routed_experts"] * busiest / moe.num_experts


def visited(experts: int, top_k: int, tokens: int) -> float:
    """How many of a layer's experts `tokens` tokens visit, if each is as likely as any other: e (1 - (1 - k/e)^tokens)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@functools.lru_cache(maxsize=64)
def int8_share(config: Llama4Config, low: QuantRecipe | None) -> float:
    """Of a token's products besides attention, the share whose inputs `low` rounds to int8."""
    count = accounting.parameters(config)
    active = {part: getattr(count, part) for part in ("unembedding", "attention", "dense", "router", "shared_experts")}
    active["routed_experts"] = count.active_experts
    specs = recipe.specs(names.split(abstract(config))[1], low) if low else {}
    rounded = {_part(name) for name, spec in specs.items() if spec.activations == "int8"}
    return sum(active[part] for part in rounded & set(active)) / sum(active.values())


def _part(name: str) -> str:
    return next((part for text, part in _PARTS.items() if text in name), "norms")
