"""Products of spread tokens with spread weights, in training on a mesh: fully sharded data parallelism, spelt out.

Each device gathers a weight in the compute dtype, multiplies its own tokens with it and forgets it. The gradient of the
weight is reduce-scattered into the shards that it came from, in the compute dtype as well. Left to itself the compiler adds
such gradients up in float32 and in full, and gathers shards that do not fill tiles by an all-reduce: four times the bytes.

Source: Zhao et al. 2023, "PyTorch FSDP"; widths over `tensor` as in Shoeybi et al. 2019, "Megatron-LM".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import TRAIN

# What splits the storage of weights alone, and what splits the widths that products run over.
STORED = TRAIN.table["embed"]


def marked(module: nnx.Module) -> nnx.Module:
    """`module` with its dense weights marked as spread, for tokens [b t d] that are; itself without a mesh."""
    if partitioning.mesh_in_use() is None:
        return module

    def mark(parameter: nnx.Param) -> nnx.Param:
        names = getattr(parameter, "axes", ())[-parameter.ndim :]  # inside a scan the axis of layers is gone
        return nnx.Param(parameter[...], axes=names, spread="embed" in names)

    return jax.tree.map(mark, module, is_leaf=lambda node: isinstance(node, nnx.Param))


def mesh_of(kernel: nnx.Param) -> AbstractMesh | None:
    """The mesh over which a kernel is marked as spread."""
    return partitioning.mesh_in_use() if kernel.get_metadata().get("spread") else None


def product(mesh: AbstractMesh, x: jax.Array, kernel: nnx.Param, num_inputs: int) -> jax.Array:
    """`x` [b t inputs] by `kernel` [inputs outputs], [b t outputs] in x's dtype."""
    batch, time = partitioning.batch_axes()
    stored = partitioning.spec(kernel.axes, kernel.shape, TRAIN, mesh)
    widths = [_widths(name) for name in kernel.axes]
    inputs, outputs = widths[:num_inputs], widths[num_inputs:]
    summed = tuple(axis for axes in inputs for axis in axes)

    # Matrix units add up in fp32 and round once; a CPU has to be told. Asked for fp32, the gradient's products are in it too.
    wide = jnp.float32 if partitioning.platform() == "cpu" else x.dtype

    def local(x, weight):
        weight = gather(weight, kernel.axes)
        y = jnp.tensordot(x, weight, axes=num_inputs, preferred_element_type=wide).astype(x.dtype)
        return lax.psum(y, summed) if summed else y

    specs = PartitionSpec(batch, time, *inputs), stored
    call = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(batch, time, *outputs), check_vma=False
    )
    return call(x, kernel[...])


def gather(weight: jax.Array, names: Sequence[str]) -> jax.Array:
    """A device's shard of a weight made whole along what only storage splits; inside `jax.shard_map`."""
    for dimension, name in enumerate(names):
        if name == "embed":
            weight = joined(weight, STORED, dimension)
    return weight


# Both go over one mesh axis after another, with the pieces on a new leading axis and whatever is on either side of the
# dimension in one axis: collectives over several axes at once, or along an axis that is not outermost in memory, the TPU
# compiler writes as all-reduces of twice the bytes.


def joined(shard: jax.Array, axes: Sequence[str], dimension: int) -> jax.Array:
    """Shards of a group of devices put together along `dimension`, which mesh axes `axes` split, outermost first."""
    for axis in reversed(axes):
        if lax.axis_size(axis) > 1:
            before, after = shard.shape[:dimension], shard.shape[dimension + 1 :]
            pieces = lax.all_gather(
                shard.reshape(math.prod(before), -1, math.prod(after)), axis
            )  # [n before d/n after]
            shard = jnp.moveaxis(pieces, 0, 1).reshape(*before, -1, *after)
    return shard


def parted(whole: jax.Array, axes: Sequence[str], dimension: int) -> jax.Array:
    """The reverse of `joined`: wholes of a group of devices added up, of which each keeps its part."""
    for axis in axes:
        size = lax.axis_size(axis)
        if size > 1:
            before, after = whole.shape[:dimension], whole.shape[dimension + 1 :]
            pieces = whole.reshape(math.prod(before), size, -1, math.prod(after))
            part = lax.psum_scatter(jnp.moveaxis(pieces, 1, 0), axis, scatter_dimension=0)  # [before d/n after]
            whole = part.reshape(*before, -1, *after)
    return whole


def _widths(name: str) -> tuple[str, ...]:
    return () if name == "embed" else tuple(TRAIN.table.get(name, ()))
