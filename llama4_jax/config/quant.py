"""How a weight is held in few bits, and what its inputs are rounded to."""

from __future__ import annotations

import dataclasses

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
