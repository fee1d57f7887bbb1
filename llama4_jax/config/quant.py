"""Which weights are held in few bits, in which, and what their inputs are rounded to.

Presets are functions of the group, the number of inputs that share a scale: 128 suits the released models, whose widths it
divides; small ones want 32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

VALUES = ("int4", "int8", "float8_e4m3fn")  # what weights are rounded to
ACTIVATIONS = (None, "int8", "float8_e4m3fn")
SCALES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The low-bit form of a weight. Bits a weight: those of `values`, and those of a scale (and an offset) a group."""

    values: str = "int4"  # one of VALUES
    group: int | None = 128  # inputs of an output that share a scale; None: all of them ("per channel")
    symmetric: bool = True  # integers stand for values * scale, or for (values - offset) * scale
    activations: str | None = None  # one of ACTIVATIONS: what each row of inputs is rounded to, with a scale of its own
    scales: str = "bfloat16"  # one of SCALES, the dtype of scales and offsets

    def __post_init__(self):
        for field, known in (("values", VALUES), ("activations", ACTIVATIONS), ("scales", SCALES)):
            if getattr(self, field) not in known:
                raise ValueError(f"QuantSpec.{field}={getattr(self, field)!r}: wanted one of {known}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"QuantSpec.group={self.group}: wanted a positive number, or None for one scale an output")
        if not self.symmetric and self.values == "float8_e4m3fn":
            raise ValueError("QuantSpec.symmetric=False wants integers; float8_e4m3fn has no offset")

    @property
    def bits(self) -> int:
        """Of a value alone."""
        return 4 if self.values == "int4" else 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantRecipe:
    """Weights by pattern: the first rule whose pattern a parameter's dotted name ends with decides (`config.lora.matches`).

    A rule with None, and no rule at all, keeps a parameter as it is. Presets keep routers, norms, embeddings, biases and the
    vision tower: together a small share of the bytes, and what rounding harms most.
    """

    name: str
    rules: tuple[tuple[str, QuantSpec | None], ...]


EXPERTS = ("decoder.*.experts.gate_up", "decoder.*.experts.down")
DENSE = ("decoder.*.gate_up.kernel", "decoder.*.down.kernel")  # shared experts too
ATTENTION = ("decoder.*.attention.*.kernel",)
HEAD = ("head.kernel",)


def int4_all(group: int | None = 128) -> QuantRecipe:
    """Every matrix of the decoder and the unembedding in int4."""
    return _same("int4_all", EXPERTS + DENSE + ATTENTION + HEAD, QuantSpec(group=group))


def int4_experts(group: int | None = 128) -> QuantRecipe:
    """Routed experts in int4: nearly all of the memory, and a part of what a token reads."""
    return _same("int4_experts", EXPERTS, QuantSpec(group=group))


def w4a8(group: int | None = 128) -> QuantRecipe:
    """Every matrix of the decoder in int4, its inputs in int8 with a scale a row."""
    return _same("w4a8", EXPERTS + DENSE + ATTENTION, QuantSpec(group=group, activations="int8"))


def int8(group: int | None = None) -> QuantRecipe:
    """Every matrix of the decoder and the unembedding in int8, by default with a scale an output."""
    return _same("int8", EXPERTS + DENSE + ATTENTION + HEAD, QuantSpec(values="int8", group=group))


def fp8_mixed(group: int | None = None) -> QuantRecipe:
    """Routed experts and their inputs in 8-bit floats, the rest as it is: what Meta released Maverick in."""
    spec = QuantSpec(values="float8_e4m3fn", group=group, activations="float8_e4m3fn")
    return _same("fp8_mixed", EXPERTS, spec)


PRESETS: dict[str, Callable[[int | None], QuantRecipe]] = {
    preset.__name__: preset for preset in (int4_all, int4_experts, w4a8, int8, fp8_mixed)
}


def _same(name: str, patterns: tuple[str, ...], spec: QuantSpec) -> QuantRecipe:
    return QuantRecipe(name=name, rules=tuple((pattern, spec) for pattern in patterns))
