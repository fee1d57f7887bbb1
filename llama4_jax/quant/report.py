"""What share of a model is held in few bits: parameters and bytes, in all and for each kind of matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from llama4_jax.config.lora import matches
from llama4_jax.config.quant import QuantRecipe
from llama4_jax.core import names, quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import forms, recipe

# The first pattern that a name ends with (`config.lora.matches`) says what kind of parameter it is.
GROUPS = {
    "vision": "vision.*",
    "routed experts": "decoder.*.experts.*",
    "shared experts": "decoder.*.shared.*",
    "routers": "decoder.*.router.*",
    "dense feed-forward": "decoder.*.feed_forward.*",
    "attention": "decoder.*.attention.*",
    "embeddings": "embed.*",
    "unembedding": "head.*",
    "norms": "*",
}


@dataclasses.dataclass(frozen=True)
class Share:
    """Sums over some parameters; bits as they are stored, scales and offsets of what is quantised among them."""

    parameters: int = 0
    quantised: int = 0  # of these, held in few bits
    bits: int = 0
    quantised_bits: int = 0  # of these, what quantised parameters take

    def __add__(self, other: Share) -> Share:
        return Share(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Share)))

    def to_dict(self) -> dict[str, int | float]:
        """In words that explain themselves; shares from 0 to 1."""
        return {
            "parameters": self.parameters,
            "share_of_parameters_quantised": self.quantised / max(self.parameters, 1),
            "bytes": self.bits / 8,
            "share_of_bytes_quantised": self.quantised_bits / max(self.bits, 1),
            "bits_per_weight": self.bits / max(self.parameters, 1),
        }


def report(model: nnx.Module, rules: QuantRecipe | None = None) -> dict[str, dict[str, Any]]:
    """`Share.to_dict` of each group in GROUPS that the model has, and of "total".

    model: quantised or not; it may be abstract. rules: what it would be if these were followed.
    """
    leaves = names.held(model)
    if rules is not None:
        leaves |= forecast(leaves, rules)
    shares: dict[str, Share] = {}
    for name, leaf in leaves.items():
        group = next(group for group, pattern in GROUPS.items() if matches(name, pattern))
        shares[group] = shares.get(group, Share()) + _share(leaf)
    shares = {group: shares[group] for group in GROUPS if group in shares}
    shares["total"] = sum(shares.values(), Share())
    return {group: share.to_dict() for group, share in shares.items()}


def forecast(leaves: Mapping[str, jax.Array], rules: QuantRecipe) -> dict[str, QuantizedArray]:
    """The shapes and dtypes of what `rules` make of parameters by dotted name; nothing is computed."""

    def abstract(name: str, spec) -> QuantizedArray:
        inputs = forms.inputs_of(name, leaves[name].ndim)
        weight = jax.ShapeDtypeStruct(leaves[name].shape, leaves[name].dtype)
        return jax.eval_shape(lambda weight: quantized.quantize(weight, spec, inputs), weight)

    return {name: abstract(name, spec) for name, spec in recipe.specs(leaves, rules).items()}


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """What `report` returns, a line a group."""
    width = max(map(len, figures))
    lines = [
        f"{'':<{width}}  {'parameters':>15}  {'quantised':>9}  {'MiB':>12}  {'quantised':>9}  {'bits a weight':>13}"
    ]
    for group, row in figures.items():
        lines.append(
            f"{group:<{width}}  {row['parameters']:>15,}  {row['share_of_parameters_quantised']:>9.2%}  "
            f"{row['bytes'] / 2**20:>12,.2f}  {row['share_of_bytes_quantised']:>9.2%}  {row['bits_per_weight']:>13.3f}"
        )
    return "\n".join(lines)


def _share(leaf: jax.Array | QuantizedArray) -> Share:
    if isinstance(leaf, QuantizedArray):
        return Share(leaf.size, leaf.size, leaf.bits, leaf.bits)
    return Share(parameters=leaf.size, bits=leaf.size * jax.dtypes.itemsize_bits(leaf.dtype))
