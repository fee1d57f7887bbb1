"""FP8 weights with scales, read as the floats that they stand for.

A quantised linear layer is two tensors: `NAME.weight` in float8_e4m3fn and `NAME.weight_scale`, one positive number for
each output channel ([out 1]) or one for the whole tensor ([], [1] or [1 1]). The weight meant is their product.
Activations that the release also quantised stay floats here: dequantising can only come closer to the trained model.

Source: `compressed-tensors`, format "float-quantized", strategies "channel" and "tensor".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llama4_jax.checkpoint.leaves import Reader

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE = "_scale"
STRATEGIES = ("channel", "tensor")


def check_config(quantization: Mapping[str, Any]) -> None:
    """Raises NotImplementedError unless the `quantization_config` of a config.json describes weights read here."""
    groups = quantization.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    readable = weights and all(
        group.get("type") == "float"
        and group.get("num_bits") == 8
        and group.get("strategy") in STRATEGIES
        and group.get("symmetric", True)
        for group in weights
    )
    if quantization.get("quant_method") != "compressed-tensors" or not readable:
        raise NotImplementedError(
            f"config.json: quantization_config={dict(quantization)}; wanted quant_method 'compressed-tensors' with "
            "symmetric 8-bit float weights, one scale a channel or a tensor; save the model unquantised elsewhere first"
        )


class Dequantised:
    """A reader of what `stored` means: FP8 weights multiplied by their scales, everything else unchanged.

    The scales are not among its tensors. A dequantised tensor has its scale's dtype, as in `compressed-tensors`; the
    product is rounded once. Raises ValueError listing every FP8 tensor without scale, every scale without FP8 tensor
    and every scale of another shape; `read` raises ValueError for scales that are not positive and finite.
    """

    def __init__(self, stored: Reader):
        self._stored = stored
        quantised = {key for key, dtype in stored.dtypes.items() if dtype == FP8}
        problems = _problems(stored, quantised)
        if problems:
            raise ValueError("FP8 tensors and their scales do not match:\n  " + "\n  ".join(problems))
        names = [key for key in stored.shapes if key.removesuffix(SCALE) not in quantised or key in quantised]
        self.shapes = {key: stored.shapes[key] for key in names}
        self.dtypes = {key: stored.dtypes[key + SCALE if key in quantised else key] for key in names}

    def read(self, key: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of its first axis, dequantised if it is stored in FP8."""
        tensor = self._stored.read(key, rows)
        if tensor.dtype != FP8:
            return tensor
        scale = self._stored.read(key + SCALE)
        if not np.all(np.isfinite(scale.astype(np.float32)) & (scale.astype(np.float32) > 0)):
            raise ValueError(f"{key + SCALE}: scales must be positive and finite; the file is damaged, get it again")
        column = scale.astype(np.float32).reshape(-1, 1)
        own = column[rows] if len(column) > 1 else column  # a scale for each row, or one for all
        return (tensor.astype(np.float32) * own).astype(self.dtypes[key])


def _problems(stored: Reader, quantised: set[str]) -> list[str]:
    found = []
    for key in sorted(quantised):
        shape = stored.shapes[key]
        if not key.endswith(".weight") or len(shape) != 2:
            found.append(f"{key}: FP8 of shape {shape}; wanted the matrix [out in] of a linear layer")
        elif key + SCALE not in stored.shapes:
            found.append(f"{key}: FP8 without {key + SCALE}")
        elif stored.shapes[key + SCALE] not in ((shape[0], 1), (), (1,), (1, 1)):
            found.append(f"{key + SCALE}: wanted {(shape[0], 1)} or one number, got {stored.shapes[key + SCALE]}")
        elif stored.dtypes[key + SCALE] == FP8:
            found.append(f"{key + SCALE}: a scale in FP8")
    lonely = {key for key in stored.shapes if key.endswith(".weight" + SCALE)} - {key + SCALE for key in quantised}
    return found + [f"{key}: a scale, but {key.removesuffix(SCALE)} is not in FP8" for key in sorted(lonely)]
