"""Products with a `QuantizedArray` as XLA makes them: the weight is dequantised to x's dtype, then multiplied as any other.

The portable path, and the bit-exact one: in float32 on a CPU it is the product that a module with the dequantised weight
computes. On an accelerator a plain product reads few bits only if XLA fuses the conversion into it, and a grouped one writes
every expert's floats to memory first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.grouped_matmul import grouped_matmul
from llama4_jax.kernels.int4_matmul.reference import rounded


def matmul(x: jax.Array, weight: QuantizedArray, *, dtype=None, over: tuple[str, ...] = ()) -> jax.Array:
    """`x [m k] @ weight [k n..]` with sums in float32; see `api.matmul`."""
    matrix = weight.astype(x.dtype).dequantize()
    rows = rounded(x, weight.activations, over)
    return jnp.tensordot(rows, matrix, axes=1, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def grouped(
    x: jax.Array, weight: QuantizedArray, group_sizes: jax.Array, *, dtype=None, over: tuple[str, ...] = ()
) -> jax.Array:
    """Each row of x [m k] times its group's matrix of weight [e k n..]; see `api.grouped`."""
    rows = rounded(x, weight.activations, over)
    return grouped_matmul(rows, weight.astype(x.dtype).dequantize(), group_sizes).astype(dtype or x.dtype)
