"""Parameters held in few bits, as the arrays of their own that a checkpoint stores: PATH.values, PATH.scales, PATH.offsets.

`Held` is what a checkpoint has to say beside these arrays to put a `core.quantized.QuantizedArray` together again. The
arrays' shapes follow from it: scales lie along the inputs of the parameter's product (`quant.forms`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config.quant import VALUES, QuantSpec
from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import forms

PARTS = ("values", "scales", "offsets")
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Held:
    """How a parameter is held in few bits, and the dtype of the array it stands for."""

    spec: QuantSpec
    dtype: str

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[:2] if self.spec.symmetric else PARTS

    def part_dtype(self, part: str) -> np.dtype:
        return jnp.dtype(self.spec.values if part == "values" else self.spec.scales)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.spec), "dtype": self.dtype}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Held:
        fields = dict(fields)
        dtype = fields.pop("dtype")
        return cls(QuantSpec(**fields), dtype)


def held(path: str, array: QuantizedArray) -> Held:
    """How `array`, the parameter `path`, is held.

    Raises ValueError for values of a dtype that is still being trained, and for scales that lie along anything but inputs.
    """
    kind = str(array.values.dtype)
    if kind not in VALUES:
        raise ValueError(f"{path}: values are {kind}; wanted one of {', '.join(VALUES)}. Round them first")
    inputs = _inputs(path, array.ndim)
    group, every = math.prod(array.blocks), math.prod(array.shape[axis] for axis in inputs)
    spec = QuantSpec(
        values=kind,
        group=None if group == every else group,
        symmetric=array.offsets is None,
        activations=array.activations,
        scales=str(array.scales.dtype),
    )
    wanted = quantized.scales_shape(array.shape, inputs, spec.group)
    if wanted != array.scales.shape:
        raise ValueError(f"{path}: wanted scales {wanted}, along the inputs, got {array.scales.shape}")
    return Held(spec, jnp.dtype(array.dtype).name)


def shapes(path: str, shape: Shape, how: Held) -> dict[str, Shape]:
    """Name -> shape of each array that the parameter `path` of this shape is stored in."""
    scales = quantized.scales_shape(shape, _inputs(path, len(shape)), how.spec.group)
    return {f"{path}.{part}": shape if part == "values" else scales for part in how.parts}


def in_parts(params: Mapping[str, Shape], few: Mapping[str, Held]) -> dict[str, Shape]:
    """The arrays that parameters are stored in, those in `few` in parts."""
    found: dict[str, Shape] = {}
    for path, shape in params.items():
        found |= shapes(path, shape, few[path]) if path in few else {path: shape}
    return found


def alone(homes: Mapping[str, tuple[str, tuple]], few: Mapping[str, Held]) -> dict[str, Held]:
    """`few` of a model that may be stacked, layer by layer; homes: name of an array -> that of the one it is in, and where."""
    found = {}
    for name, (home, _) in homes.items():
        path, part = split(home, few)
        if part == "values":
            found[name.removesuffix(".values")] = few[path]
    return found


def stacked(homes: Mapping[str, tuple[str, tuple]], few: Mapping[str, Held]) -> dict[str, Held]:
    """`few` of a model layer by layer, for one that may be stacked; homes: parameter -> that which it is in, and where.

    Raises ValueError, naming two, where layers that share an array are not all held alike.
    """
    found: dict[str, tuple[str, Held | None]] = {}
    for path, (home, _) in homes.items():
        first, how = found.setdefault(home, (path, few.get(path)))
        if how != few.get(path):
            raise ValueError(
                f"{first} is {how or 'not in few bits'} and {path} is {few.get(path) or 'not'}, so they do not stack; "
                "load with scan=False"
            )
    return {home: how for home, (_, how) in found.items() if how is not None}


def abstract(path: str, shape: Shape, how: Held) -> QuantizedArray:
    """The array that the parameter `path` will be, without its numbers."""
    parts = {
        part: jax.ShapeDtypeStruct(each, how.part_dtype(part))
        for part, each in zip(how.parts, shapes(path, shape, how).values())
    }
    return QuantizedArray(**parts, dtype=how.dtype, activations=how.spec.activations)


def split(name: str, few: Collection[str]) -> tuple[str, str | None]:
    """A parameter and which of its parts `name` is; None for an array that is stored as it is."""
    path, _, part = name.rpartition(".")
    return (path, part) if path in few and part in PARTS else (name, None)


def stored_name(name: str) -> str:
    """The name under which a checkpoint has a leaf that `core.names` calls `name`: PATH.value.scales is PATH.scales."""
    path, _, part = name.rpartition(".")
    return f"{path.removesuffix('.value')}.{part}" if part in PARTS and path.endswith(".value") else name


def _inputs(path: str, ndim: int) -> tuple[int, ...]:
    inputs = forms.inputs_of(path, ndim)
    if inputs is None:
        raise ValueError(f"{path} is in no product, and so not held in few bits")
    return inputs
