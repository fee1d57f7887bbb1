"""What products with few-bit weights should give: in float64 by NumPy, group by group, with the error each may have."""

from __future__ import annotations

import numpy as np

from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.testing import budget


def expected(x, weight: QuantizedArray, group_sizes=None) -> tuple[np.ndarray, np.ndarray]:
    """The product of x [m k] with weight [k n..] or, by groups, [e k n..], and the error allowed to each element.

    Rounding errors of integers and of their offsets grow with both, though their difference is what counts.
    """
    rows = _wide(x)
    if weight.activations:
        integers, row_scales = quantized.quantize_rows(x, weight.activations)
        rows = _wide(integers) * _wide(row_scales)
    values, scales = _wide(weight.values), _spread(weight.scales, weight.shape)
    offsets = 0 if weight.offsets is None else _spread(weight.offsets, weight.shape)
    matrices, sizes = (values - offsets) * scales, (np.abs(values) + np.abs(offsets)) * scales
    if group_sizes is None:
        matrices, sizes, group_sizes = matrices[None], sizes[None], [len(rows)]
    out, size = (np.zeros((len(rows), *matrices.shape[2:])) for _ in range(2))
    ends = np.cumsum(np.asarray(group_sizes))
    for index, (start, end) in enumerate(zip(ends - np.asarray(group_sizes), ends)):
        out[start:end] = np.tensordot(rows[start:end], matrices[index], 1)
        size[start:end] = np.tensordot(np.abs(rows[start:end]), sizes[index], 1)
    return out, budget.matmul_tolerance(x.dtype, rows.shape[1]) * size


def check(out, x, weight: QuantizedArray, group_sizes=None) -> None:
    """Asserts that an implementation gave `out` for these."""
    want, allowed = expected(x, weight, group_sizes)
    assert out.shape == want.shape and out.dtype == x.dtype
    error = np.abs(_wide(out) - want)
    assert (error <= allowed).all(), f"off by up to {np.max(error / np.maximum(allowed, 1e-30)):.3g} times the budget"


def _spread(scales, shape) -> np.ndarray:
    scales = _wide(scales)
    for axis, size in enumerate(shape):
        scales = np.repeat(scales, size // scales.shape[axis], axis)
    return scales


def _wide(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
