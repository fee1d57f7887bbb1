"""Products with a `QuantizedArray`, all in float32: the specification, which writes the whole float32 weight.

Source: what a `core.quantized.QuantizedArray` stands for, and the grouped product of `kernels.grouped_matmul.reference`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.grouped_matmul import reference


def matmul(x: jax.Array, weight: QuantizedArray, *, dtype=None, over: tuple[str, ...] = ()) -> jax.Array:
    """`x [m k] @ weight [k n..]`; see `api.matmul`."""
    rows = rounded(x.astype(jnp.float32), weight.activations, over)
    matrix = weight.astype(jnp.float32).dequantize()
    precise = jax.lax.Precision.HIGHEST  # matrix units would round float32 to bfloat16
    return jnp.tensordot(rows, matrix, axes=1, precision=precise).astype(dtype or x.dtype)


def grouped(
    x: jax.Array, weight: QuantizedArray, group_sizes: jax.Array, *, dtype=None, over: tuple[str, ...] = ()
) -> jax.Array:
    """Each row of x [m k] times its group's matrix of weight [e k n..]; see `api.grouped`."""
    rows = rounded(x.astype(jnp.float32), weight.activations, over)
    with jax.default_matmul_precision("highest"):
        out = reference.grouped_matmul(rows, weight.astype(jnp.float32).dequantize(), group_sizes)
    return out.astype(dtype or x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def rounded(x: jax.Array, activations: str | None, over: tuple[str, ...] = ()) -> jax.Array:
    """Rows x [.. k] as `activations` can hold them, with a scale a row; in x's dtype. Its gradient passes straight through.

    activations: see `QuantSpec`; None leaves x as it is. over: see `quantized.quantize_rows`.
    """
    if activations is None:
        return x
    values, scales = quantized.quantize_rows(x, activations, over=over)
    return (values.astype(jnp.float32) * scales).astype(x.dtype)


@rounded.defjvp
def _straight_through(activations, over, primals, tangents):
    return rounded(primals[0], activations, over), tangents[0]
