"""Quantised linear layers of Hugging Face checkpoints: as they are held, or as the floats that they stand for.

A quantised matrix `NAME.weight` [out in] is several tensors:

    NAME.weight_packed      int32 [out words], the integers side by side (`packing`); with NAME.weight_shape, out and in
    NAME.weight             instead of those, int8 or float8_e4m3fn [out in]
    NAME.weight_scale       positive numbers [out groups], or [out 1], or one number for all: [], [1] or [1 1]
    NAME.weight_zero_point  of asymmetric integers: int8 [out groups], or packed along out

It stands for (weight - zero point) * scale. A group is successive columns. What inputs are rounded to, `schemes` reads; where
weights are dequantised inputs stay floats, which can only come closer to the trained model.

Source: `compressed-tensors` 0.20, formats "pack-quantized", "int-quantized" and "float-quantized".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llama4_jax.checkpoint import low_bit, packing
from llama4_jax.checkpoint.leaves import Reader
from llama4_jax.checkpoint.schemes import Schemes
from llama4_jax.config.quant import QuantSpec

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
STORED = {"int4": packing.INT4, "int8": np.dtype(np.int8), "float8_e4m3fn": FP8}
PACKED, SHAPE, SCALE, ZERO_POINT = "_packed", "_shape", "_scale", "_zero_point"
INTEGERS = (np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64))


class Kept:
    """A reader of `stored` in which a quantised matrix KEY is KEY.values, KEY.scales and, if asymmetric, KEY.offsets.

    `specs` says of each how it is quantised, by the `quantization_config` of a config.json; without one, weights in FP8 have
    a scale a channel. Raises ValueError listing all that does not fit together, NotImplementedError for integers that are no
    quantised weights; `read` raises ValueError for scales that are not positive and finite.
    """

    def __init__(self, stored: Reader, quantization: Mapping[str, Any] | None = None):
        self._stored = stored
        self._packed = {key.removesuffix(PACKED) for key in stored.shapes if key.endswith(".weight" + PACKED)}
        schemes = Schemes(quantization) if quantization else None
        plain = {key for key, dtype in stored.dtypes.items() if dtype == FP8 or (schemes and _is_int8(key, dtype))}
        problems: list[str] = []
        self.specs = {key: self._spec(key, schemes, problems) for key in sorted(self._packed | plain)}
        self._matrices = {key: self._matrix(key, problems) for key in self.specs}
        for key in self.specs:
            problems += self._misfits(key) if self._matrices[key] else []
        lonely = {key for key in stored.shapes if key.endswith(".weight" + SCALE)} - {key + SCALE for key in self.specs}
        problems += [
            f"{key}: a scale, but {key.removesuffix(SCALE)} is not in FP8 or integers" for key in sorted(lonely)
        ]
        if problems:
            raise ValueError("quantised tensors and their scales do not match:\n  " + "\n  ".join(problems))
        self._list_tensors()

    def read(self, key: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of its first axis."""
        base, part = low_bit.split(key, self.specs)
        if part is None:
            return self._stored.read(key, rows)
        return {"values": self._values, "scales": self._scales, "offsets": self._offsets}[part](base, rows)

    def scale_dtype(self, key: str) -> np.dtype:
        """The dtype in which the scales of `key` are stored."""
        return self._stored.dtypes[key + SCALE]

    def _spec(self, key: str, schemes: Schemes | None, problems: list[str]) -> QuantSpec:
        found = schemes.of(key.removesuffix(".weight")) if schemes else None
        if found is None:
            if key in self._packed or schemes:
                problems.append(f"{key}: quantised, but no group of config.json's quantization_config names it")
            found = QuantSpec(values="float8_e4m3fn", group=None)
        elif key not in self._packed and STORED[found.values] != self._stored.dtypes[key]:
            problems.append(f"{key}: {self._stored.dtypes[key]}, but config.json says {found.values}")
        scales = self._stored.dtypes.get(key + SCALE)
        return dataclasses.replace(found, scales="bfloat16" if scales == ml_dtypes.bfloat16 else "float32")

    def _matrix(self, key: str, problems: list[str]) -> tuple[int, ...] | None:
        """Rows and columns of the weight; None with a problem noted."""
        shapes = self._stored.shapes
        if key in self._packed:
            if shapes.get(key + SHAPE) != (2,):
                problems.append(
                    f"{key + SHAPE}: wanted the shape of the weight, 2 numbers, got {shapes.get(key + SHAPE)}"
                )
                return None
            return tuple(map(int, self._stored.read(key + SHAPE)))
        if not key.endswith(".weight") or len(shapes[key]) != 2:
            kind = "FP8" if self._stored.dtypes[key] == FP8 else self._stored.dtypes[key]
            problems.append(f"{key}: {kind} of shape {shapes[key]}; wanted the matrix [out in] of a linear layer")
            return None
        return shapes[key]

    def _misfits(self, key: str) -> list[str]:
        """What is wrong with the tensors of a weight."""
        spec, (out, columns), shapes = self.specs[key], self._matrices[key], self._stored.shapes
        if spec.group and columns % spec.group:
            return [f"{key}: groups of {spec.group} do not divide {columns} columns"]
        groups = columns // spec.group if spec.group else 1
        wanted = {SCALE: ((out, groups),) + (((), (1,), (1, 1)) if spec.group is None else ())}
        words = packing.num_words(out, spec.bits) if key in self._packed else out
        wanted |= {} if spec.symmetric else {ZERO_POINT: ((words, groups),)}
        wanted |= {PACKED: ((out, packing.num_words(columns, spec.bits)),)} if key in self._packed else {}
        problems = []
        for end, fine in wanted.items():
            if key + end not in shapes:
                kind = {"float8_e4m3fn": "FP8"}.get(spec.values, spec.values)
                problems.append(f"{key}: {kind} without {key + end}")
            elif shapes[key + end] not in fine:
                one = " or one number" if len(fine) > 1 else ""
                problems.append(f"{key + end}: wanted {fine[0]}{one}, got {shapes[key + end]}")
        if self._stored.dtypes.get(key + SCALE) in (FP8, *INTEGERS):
            problems.append(f"{key + SCALE}: a scale in {self._stored.dtypes[key + SCALE]}")
        return problems

    def _list_tensors(self) -> None:
        """Names the tensors that this has, with shapes and dtypes."""
        used = {key + end for key in self.specs for end in ("", PACKED, SHAPE, SCALE)}
        used |= {key + ZERO_POINT for key, spec in self.specs.items() if not spec.symmetric}
        self.shapes = {key: shape for key, shape in self._stored.shapes.items() if key not in used}
        self.dtypes = {key: self._stored.dtypes[key] for key in self.shapes}
        for key, dtype in self.dtypes.items():
            if dtype in INTEGERS:
                raise NotImplementedError(
                    f"{key} has dtype {dtype}, and config.json does not say that it is of a quantised weight. "
                    "Dequantise the checkpoint to bfloat16 first."
                )
        for key, spec in self.specs.items():
            out, columns = self._matrices[key]
            scales = (out, columns // spec.group if spec.group else 1)
            for part in low_bit.PARTS[: 2 if spec.symmetric else 3]:
                self.shapes[f"{key}.{part}"] = (out, columns) if part == "values" else scales
                self.dtypes[f"{key}.{part}"] = np.dtype(STORED[spec.values] if part == "values" else spec.scales)

    def _values(self, key: str, rows: slice) -> np.ndarray:
        if key not in self._packed:
            return self._stored.read(key, rows)
        return packing.unpack_words(self._stored.read(key + PACKED, rows), self.specs[key].bits, self._matrices[key][1])

    def _scales(self, key: str, rows: slice) -> np.ndarray:
        whole = self._stored.shapes[key + SCALE] == self.shapes[f"{key}.scales"]
        scale = self._stored.read(key + SCALE, rows) if whole else self._stored.read(key + SCALE)
        if not np.all(np.isfinite(scale.astype(np.float32)) & (scale.astype(np.float32) > 0)):
            raise ValueError(f"{key + SCALE}: scales must be positive and finite; the file is damaged, get it again")
        every = scale if whole else np.broadcast_to(scale.reshape(1, 1), self.shapes[f"{key}.scales"])[rows]
        return every.astype(self.dtypes[f"{key}.scales"])

    def _offsets(self, key: str, rows: slice) -> np.ndarray:
        if key in self._packed:
            words = self._stored.read(key + ZERO_POINT).T
            stored = packing.unpack_words(words, self.specs[key].bits, self._matrices[key][0]).T[rows]
        else:
            stored = self._stored.read(key + ZERO_POINT, rows)
        return stored.astype(self.dtypes[f"{key}.offsets"])


class Dequantised:
    """A reader of what `stored` means: quantised weights as floats, everything else unchanged; errors as `Kept`.

    A dequantised tensor has its scales' dtype, as in `compressed-tensors`; the product is rounded once.
    """

    def __init__(self, stored: Reader, quantization: Mapping[str, Any] | None = None):
        self._kept = kept = Kept(stored, quantization)
        names = [key for key in kept.shapes if low_bit.split(key, kept.specs)[1] is None]
        self.shapes = {key: kept.shapes[key] for key in names}
        self.dtypes = {key: kept.dtypes[key] for key in names}
        self.shapes |= {key: kept.shapes[f"{key}.values"] for key in kept.specs}
        self.dtypes |= {key: kept.scale_dtype(key) for key in kept.specs}

    def read(self, key: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of its first axis, dequantised if it is stored in few bits."""
        if key not in self._kept.specs:
            return self._kept.read(key, rows)
        weight = self._kept.read(f"{key}.values", rows).astype(np.float32)
        scales = self._kept.read(f"{key}.scales", rows).astype(np.float32)
        repeats = weight.shape[1] // scales.shape[1]
        if not self._kept.specs[key].symmetric:
            weight -= np.repeat(self._kept.read(f"{key}.offsets", rows).astype(np.float32), repeats, axis=1)
        weight *= np.repeat(scales, repeats, axis=1) if scales.shape[1] > 1 else scales
        return weight.astype(self.dtypes[key])


def specs(readers: Mapping[str, Reader]) -> dict[str, QuantSpec]:
    """What `readers` keep in few bits: tensor -> how."""
    return {key: spec for reader in readers.values() if isinstance(reader, Kept) for key, spec in reader.specs.items()}


def _is_int8(key: str, dtype: np.dtype) -> bool:
    return dtype == np.int8 and key.endswith(".weight")
