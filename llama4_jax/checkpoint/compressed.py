"""The tensors of a quantised model as the library compressed-tensors stores them, made when asked for.

Integers are packed ("pack-quantized"), 8-bit floats are not ("float-quantized"); the names and shapes stand in `quantised`.
Scales are stored in the dtype that the weight stands for where that is theirs too, else in float32: the library, which
multiplies in the dtype of the scales, then has the same product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llama4_jax.checkpoint import assembly, low_bit, packing, schemes, tensors
from llama4_jax.checkpoint.low_bit import Held
from llama4_jax.checkpoint.quantised import PACKED, SCALE, SHAPE, ZERO_POINT

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)


class Compressed:
    """The tensors of `named`, those in few bits under the library's names.

    Raises NotImplementedError for a parameter in few bits that is not the matrix of a linear layer in this layout.
    """

    def __init__(self, named: assembly.Tensors):
        self._named, self._sources = named, {}
        self.specs: dict[str, tensors.Spec] = {}
        for name, spec in named.specs.items():
            key, part = low_bit.split(name, named.quantised)
            for stored, stored_spec in _stored(key, part, spec, named.quantised.get(key)):
                self.specs[stored], self._sources[stored] = stored_spec, name

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of them."""
        quantised = {_module(key): how.spec for key, how in self._named.quantised.items()}
        others = {_module(key) for key in self.specs if key.endswith(".weight")}
        return schemes.document(quantised, others | quantised.keys())

    def pieces(self, stored: str) -> Iterator[np.ndarray]:
        """One tensor, as the file has it, in pieces of some rows: the first axis of each, in order."""
        name = self._sources[stored]
        key, part = low_bit.split(name, self._named.quantised)
        if part is None or stored == key:
            yield from self._named.pieces(name)
        elif stored == key + SHAPE:
            yield np.array(self._named.specs[name][0], INT64)
        elif part == "offsets":
            yield _zero_points(key, self._named.make(name), self._named.quantised[key])
        else:
            bits, dtype = self._named.quantised[key].spec.bits, self.specs[stored][1]
            for piece in self._named.pieces(name):
                yield packing.pack_words(piece, bits) if part == "values" else piece.astype(dtype)

    def make(self, stored: str) -> np.ndarray:
        """One tensor, as the file has it."""
        made = list(self.pieces(stored))
        return made[0] if len(made) == 1 else np.concatenate(made)


def _stored(key: str, part: str | None, spec: tensors.Spec, how: Held | None) -> list[tuple[str, tensors.Spec]]:
    """The tensors in which an array, or a part of one, is stored."""
    shape, dtype = spec
    if part is None:
        return [(key, spec)]
    if not key.endswith(".weight") or len(shape) != 2:
        raise NotImplementedError(
            f"{key} {shape} in few bits: wanted the matrix of a linear layer; dequantise it first"
        )
    if part == "values" and how.spec.values == "float8_e4m3fn":
        return [(key, spec)]
    if part == "values":
        words = (shape[0], packing.num_words(shape[1], how.spec.bits))
        return [(key + PACKED, (words, INT32)), (key + SHAPE, ((2,), INT64))]
    if part == "scales":
        return [(key + SCALE, (shape, dtype if str(dtype) == how.dtype else np.dtype(np.float32)))]
    return [(key + ZERO_POINT, ((packing.num_words(shape[0], how.spec.bits), shape[1]), INT32))]


def _zero_points(key: str, offsets: np.ndarray, how: Held) -> np.ndarray:
    """Offsets packed along the outputs. Raises ValueError for those that no integer of so many bits is."""
    half = 1 << (how.spec.bits - 1)
    numbers = offsets.astype(np.float32)
    if np.any((numbers != np.rint(numbers)) | (numbers < -half) | (numbers >= half)):
        raise ValueError(f"{key}: wanted offsets that are whole numbers from {-half} to {half - 1}; round them first")
    integers = np.ascontiguousarray(numbers.astype(np.int8).T)
    return np.ascontiguousarray(packing.pack_words(integers, how.spec.bits).T)


def _module(key: str) -> str:
    return key.removesuffix(".weight")
