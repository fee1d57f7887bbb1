"""Weights laid out for decoding: matrices of which each device reads its own part as it lies.

A parameter [.. inputs outputs] becomes [.. k n]. What each device has of the outputs lies side by side, gates beside ups and
the numbers of a head beside each other, and is filled up to whole tiles. A TPU keeps [d 2 f], [d n h], and outputs that fill
no tiles, in an order that kernels cannot read, and would put the whole weight into another at each step: of experts all that
a device has, however few of them are visited.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import SERVE, UNSPLIT
from llama4_jax.core.quantized import QuantizedArray, spread
from llama4_jax.kernels import int4_matmul
from llama4_jax.nn import products

TILE = 128  # outputs


@dataclasses.dataclass(frozen=True)
class Outputs:
    """shape: of one row's results, cut into `ways` parts along axis `split`, which lie one after another, each filled up."""

    shape: tuple[int, ...]
    split: int
    ways: int

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of one part."""
        return (*self.shape[: self.split], self.shape[self.split] // self.ways, *self.shape[self.split + 1 :])

    @property
    def width(self) -> int:
        """Columns of a part, filled up."""
        return -(-math.prod(self.part) // TILE) * TILE

    def columns(self, array: jax.Array, leading: int, fill: float) -> jax.Array:
        """array [leading.. shape] as [leading.. n]."""
        front, at = array.shape[:leading], leading + self.split
        apart = array.reshape(*array.shape[:at], self.ways, -1, *array.shape[at + 1 :])
        apart = jnp.moveaxis(apart, at, leading).reshape(*front, self.ways, -1)
        missing = self.width - apart.shape[-1]
        filled = jnp.pad(apart, [(0, 0)] * (leading + 1) + [(0, missing)], constant_values=fill) if missing else apart
        return filled.reshape(*front, -1)

    def rows(self, product: jax.Array) -> jax.Array:
        """Results [m columns] of some parts, or all, as [m shape], `split` as long as there are parts.

        Raises ValueError where columns are no whole parts: the model was prepared for other devices.
        """
        if product.shape[1] % self.width:
            raise ValueError(
                f"weights lie in parts of {self.width} outputs, {self.ways} in all, and a device has {product.shape[1]}; "
                "prepare the model on the mesh that it decodes on"
            )
        product = product.reshape(product.shape[0], -1, self.width)[..., : math.prod(self.part)]
        product = jnp.moveaxis(product.reshape(*product.shape[:2], *self.part), 1, 1 + self.split)
        return product.reshape(*product.shape[: 1 + self.split], -1, *self.part[self.split + 1 :])


def lay_out(kernel: nnx.Param, num_inputs: int, leading: int = 0) -> tuple[nnx.Param, Outputs]:
    """A kernel [leading.. inputs.. outputs..] as [leading.. k n], and what its columns are.

    Raises ValueError where groups of inputs do not divide as the inputs do.
    """
    weight, axes = kernel[...], kernel.axes[-kernel.ndim :]
    outputs = leading + num_inputs
    split = next((i for i, axis in enumerate(axes[outputs:]) if SERVE.table.get(axis)), 0)
    mesh = partitioning.mesh_in_use()
    ways = partitioning.ways(axes[outputs + split], SERVE, mesh) if mesh else 1
    form = Outputs(weight.shape[outputs:], split, ways)
    names = (*axes[:leading], axes[leading], axes[outputs + split])
    shapes = jax.eval_shape(functools.partial(_matrix, form, num_inputs, leading), weight)
    places = None if mesh is None else _specs(names, shapes, mesh)

    @jax.jit  # whole arrays are never on one device
    def laid_out(weight):
        matrix = _matrix(form, num_inputs, leading, weight)
        return matrix if places is None else lax.with_sharding_constraint(matrix, places)

    return nnx.Param(laid_out(weight), axes=names), form


def multiply(x: jax.Array, kernel: nnx.Param, form: Outputs, num_inputs: int, dtype) -> jax.Array:
    """x [.. inputs] by a matrix that `lay_out` made: [.. outputs] of `dtype`, of a matrix of floats in float32.

    On a mesh each device reads its own part, and where they share inputs, what they make is added up in float32.
    """
    dtype = dtype if isinstance(kernel[...], QuantizedArray) else jnp.float32
    leading, weight = x.shape[: x.ndim - num_inputs], kernel[...]
    rows, mesh = x.reshape(-1, weight.shape[0]), partitioning.mesh_in_use()
    if mesh is None:
        return form.rows(_product(rows, weight, dtype)).reshape(*leading, *form.shape)
    specs = _specs(kernel.axes, weight, mesh)
    inputs, outputs = specs.values if isinstance(weight, QuantizedArray) else specs
    over = _axes(inputs)

    def local(rows, weight):
        made = form.rows(_product(rows, weight, jnp.float32 if over else dtype, over))
        return lax.psum(made, over).astype(dtype) if over else made

    tokens = _rows(rows.shape[0], mesh)
    result = PartitionSpec(tokens, *(outputs if axis == form.split else None for axis in range(len(form.shape))))
    # The kernel is no primitive that the check of what varies over the mesh knows.
    call = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(tokens, inputs), specs), out_specs=result, check_vma=False
    )
    return call(rows, weight).reshape(*leading, *form.shape)


def _product(rows: jax.Array, weight: products.Weight, dtype, over: tuple[str, ...] = ()) -> jax.Array:
    """rows [m k] by weight [k n], of which this device has a part; over: the mesh axes that divide k."""
    if isinstance(weight, QuantizedArray):
        return int4_matmul.matmul(rows, weight, dtype=dtype, over=over)
    return products.dense(rows, weight)


def _matrix(form: Outputs, num_inputs: int, leading: int, weight: products.Weight) -> products.Weight:
    """A weight [leading.. inputs.. outputs..] as [leading.. k n]; successive inputs share scales."""

    def flat(part: jax.Array, fill: float) -> jax.Array:
        front = part.shape[: leading + num_inputs]
        columns = form.columns(spread(part, (*front, *form.shape)), len(front), fill)
        return columns.reshape(*front[:leading], -1, columns.shape[-1])

    if not isinstance(weight, QuantizedArray):
        return flat(weight, 0)
    offsets = None if weight.offsets is None else flat(weight.offsets, 0)
    return dataclasses.replace(weight, values=flat(weight.values, 0), scales=flat(weight.scales, 1), offsets=offsets)


def _specs(names: Sequence[str], weight: products.Weight, mesh) -> products.Weight:
    """How a matrix lies, and of few bits its scales."""

    def of(part):
        axes = [UNSPLIT if size == 1 else name for name, size in zip(names, part.shape)]
        return partitioning.spec(axes, part.shape, SERVE, mesh)

    return jax.tree.map(of, weight)


def _rows(count: int, mesh) -> tuple[str, ...] | None:
    """The mesh axes that rows divide over; None if they do not: then each device multiplies all of them."""
    axes = tuple(axis for axis in SERVE.table["batch"] if mesh.shape[axis] > 1)
    return axes if axes and count % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()
