"""Products of activations with a parameter, in whatever form it holds its weight: floats, or few bits and scales.

The one place where modules meet a `QuantizedArray`, but for those laid out for decoding (`matrices`). On one device its
products read the few bits (`kernels.int4_matmul`); where a mesh divides them, each device makes floats of its own part first,
but of experts that are only read. Rows are rounded where the weight says so, with the scale of the whole row wherever its
parts are.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import TRAIN
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import int4_matmul
from llama4_jax.kernels.few_rows import Packed
from llama4_jax.kernels.grouped_matmul import grouped_matmul

Weight = jax.Array | QuantizedArray


def dense(x: jax.Array, weight: Weight, num_inputs: int = 1, dtype=None) -> jax.Array:
    """x [.. inputs] by weight [inputs outputs]: [.. outputs] float32.

    dtype: what the result will be rounded to, by default that of x; products with few bits round to it at once.
    """
    if isinstance(weight, QuantizedArray):
        if partitioning.mesh_in_use() is None:
            return _few_bits(x, weight, num_inputs, dtype)
        x, weight = rounded(x, activations(weight), num_inputs), floats(weight, x.dtype)
    # Sums are fp32 whatever the inputs; XLA's CPU backend is also 2.5x faster so in bfloat16.
    return jnp.tensordot(x, weight, axes=num_inputs, preferred_element_type=jnp.float32)


def grouped(rows: jax.Array, kernel: nnx.Param, group_sizes: jax.Array) -> jax.Array:
    """Each row [m k], sorted by group, by its group's matrix of kernel [e k n..]: [m n..]. Rows past the groups give 0."""
    weight = kernel[...]
    if isinstance(weight, QuantizedArray):
        # What is left of a mesh is in the hands of the compiler, which cannot divide a kernel, but not inside `jax.shard_map`.
        mesh = partitioning.mesh_in_use()
        own = mesh is not None and all(kind is AxisType.Manual for kind in mesh.axis_types)
        return int4_matmul.grouped(
            rows,
            weight,
            group_sizes,
            over=_over(kernel) if own else (),
            implementation=None if own or mesh is None else "xla",
        )
    rule = kernel.get_metadata()
    if rule.get("rows"):
        rows = int4_matmul.rounded(rows, rule["rows"], rule["over"])
    return grouped_matmul(rows, weight, group_sizes)


def in_floats(experts: nnx.Module, dtype) -> nnx.Module:
    """`experts` with plain arrays of `dtype` in place of few bits, and what `grouped` rounds rows to beside them.

    Made before the devices of a mesh divide the arrays: each then gathers, and adds up gradients of, floats as of any weight.
    """

    def of(parameter: nnx.Param) -> nnx.Param:
        weight = parameter[...]
        if not isinstance(weight, QuantizedArray):
            return parameter
        rule = {"rows": weight.activations, "over": _over(parameter)}
        return nnx.Param(floats(weight, dtype), axes=parameter.axes, **rule)

    return jax.tree.map(of, experts, is_leaf=lambda node: isinstance(node, nnx.Param))


def _over(kernel: nnx.Param) -> tuple[str, ...]:
    """The mesh axes that divide the inputs of a kernel [e k n..] where devices multiply with their parts."""
    inputs = kernel.axes[-kernel.ndim :][1]
    return tuple(TRAIN.table[inputs]) if inputs == "mlp" else ()


def activations(weight: Weight | Packed) -> str | None:
    """What rows are rounded to before they meet this weight."""
    return weight.activations if isinstance(weight, QuantizedArray | Packed) else None


def floats(weight: Weight, dtype) -> jax.Array:
    """The weight as a plain array: as it is, or what few bits stand for in `dtype`."""
    return weight.astype(dtype).dequantize() if isinstance(weight, QuantizedArray) else weight


def like(weight: Weight, values: jax.Array) -> Weight:
    """Plain `values` in the place of `weight`: rows are rounded if they were."""
    if activations(weight) is None:
        return values
    return QuantizedArray(values, jnp.ones_like(weight.scales), None, values.dtype.name, activations(weight))


def rounded(x: jax.Array, activations: str | None, num_inputs: int = 1) -> jax.Array:
    """x [.. inputs] with each row rounded."""
    if activations is None:
        return x
    rows = x.reshape(*x.shape[: x.ndim - num_inputs], -1)
    return int4_matmul.rounded(rows, activations).reshape(x.shape)


def _few_bits(x: jax.Array, weight: QuantizedArray, num_inputs: int, dtype) -> jax.Array:
    leading, inputs = x.shape[: x.ndim - num_inputs], math.prod(x.shape[x.ndim - num_inputs :])
    matrix = jax.tree.map(
        lambda part: part.reshape(-1, *part.shape[num_inputs:]), weight
    )  # successive inputs share scales
    y = int4_matmul.matmul(x.reshape(-1, inputs), matrix, dtype=dtype)
    return y.reshape(*leading, *weight.shape[num_inputs:]).astype(jnp.float32)
