"""Products of spread tokens with spread weights, in training on a mesh: fully sharded data parallelism, spelt out.

Each device gathers a weight in the compute dtype, multiplies its own tokens with it and forgets it. The gradient of the
weight is reduce-scattered into the shards that it came from, in the compute dtype as well. Left to itself the compiler adds
such gradients up in float32 and in full, and gathers shards that do not fill tiles by an all-reduce: four times the bytes.

Source: Zhao et al. 2023, "PyTorch FSDP"; widths over `tensor` as in Shoeybi et al. 2019, "Megatron-LM".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import TRAIN
from llama4_jax.nn.products import activations, floats, rounded

# Axes that only storage splits, of which products read the whole; what splits the others in TRAIN splits their products.
STORED = ("embed", "vision_embed")


def marked(module: nnx.Module, tokens: PartitionSpec | None = None) -> nnx.Module:
    """`module` with its dense weights marked as spread, for inputs [b t d] that are; itself without a mesh.

    tokens: how b and t are, which is also all that splits them; by default as the placement in use says.
    """
    if partitioning.mesh_in_use() is None:
        return module
    tokens = PartitionSpec(*partitioning.batch_axes()) if tokens is None else tokens

    def mark(parameter: nnx.Param) -> nnx.Param:
        names = getattr(parameter, "axes", ())
        return nnx.Param(parameter[...], axes=names, tokens=tokens if any(name in STORED for name in names) else None)

    return jax.tree.map(mark, module, is_leaf=lambda node: isinstance(node, nnx.Param))


def mesh_of(kernel: nnx.Param) -> AbstractMesh | None:
    """The mesh over which a kernel is marked as spread."""
    return None if kernel.get_metadata().get("tokens") is None else partitioning.mesh_in_use()


def products(mesh: AbstractMesh, x: jax.Array, kernels: Sequence[nnx.Param], num_inputs: int) -> list[jax.Array]:
    """`x` [b t inputs] by each kernel [inputs outputs], [b t outputs] in x's dtype.

    Devices that share widths add up once: results where they share inputs; where they share outputs, the gradients in x of
    all the products together. Few bits become floats where they lie, before they travel.
    """
    weights = [kernel[...] for kernel in kernels]
    if len(rules := {activations(weight) for weight in weights}) > 1:  # rows that are rounded for some of them
        return [products(mesh, x, [kernel], num_inputs)[0] for kernel in kernels]
    x = rounded(x, *rules, num_inputs)
    tokens, widths = kernels[0].get_metadata()["tokens"], [_widths(kernel) for kernel in kernels]
    inputs, split = widths[0][:num_inputs], _axes(*(each[num_inputs:] for each in widths))
    stored, summed = [_stored(kernel, mesh) for kernel in kernels], _axes(inputs)

    # Matrix units add up in fp32 and round once; a CPU has to be told. Asked for fp32, the gradient's products are in it too.
    wide = jnp.float32 if partitioning.platform() == "cpu" else x.dtype

    def local(x, *shards):
        x = lax.pcast(x, split, to="varying")  # one copy for all: its gradients meet before they travel

        def product(shard, spec, widths):
            # Copied while it is a shard, so that what devices with other tokens add to its gradient are shards, too.
            shard = lax.pcast(shard, tuple(axis for axis in _axes(tokens) if axis not in _axes(spec)), to="varying")
            y = jnp.tensordot(x, _gathered(shard, spec, widths), axes=num_inputs, preferred_element_type=wide)
            y = y.astype(x.dtype)
            return lax.psum(y, summed) if summed else y

        return [product(*each) for each in zip(shards, stored, widths)]

    call = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(*tokens, *inputs), *(PartitionSpec(*spec) for spec in stored)),
        out_specs=[result(kernel, num_inputs) for kernel in kernels],
    )
    return call(x, *(floats(weight, x.dtype) for weight in weights))


def result(kernel: nnx.Param, num_inputs: int) -> PartitionSpec:
    """How the product with a marked kernel is spread."""
    return PartitionSpec(*kernel.get_metadata()["tokens"], *_widths(kernel)[num_inputs:])


def _widths(kernel: nnx.Param) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of a kernel in products."""
    return [() if name in STORED else tuple(TRAIN.table.get(name, ())) for name in _names(kernel)]


def _stored(kernel: nnx.Param, mesh: AbstractMesh) -> list[tuple[str, ...]]:
    """Those that split each axis of its shards; the compiler gathers over what splits neither tokens nor products."""
    spec = partitioning.spec(_names(kernel), kernel.shape, TRAIN, mesh)
    known = _axes(kernel.get_metadata()["tokens"], _widths(kernel))
    return [tuple(axis for axis in _axes([part]) if axis in known) for part in spec]


def _gathered(shard: jax.Array, spec: Sequence[tuple[str, ...]], widths: Sequence[tuple[str, ...]]) -> jax.Array:
    """A device's shard of a weight made whole along what only storage splits; inside `jax.shard_map`."""
    for dimension, axes in enumerate(spec):
        shard = joined(shard, [axis for axis in axes if axis not in widths[dimension]], dimension)
    return shard


def _names(kernel: nnx.Param) -> tuple[str, ...]:
    return kernel.axes[-kernel.ndim :]  # inside a scan the axis of layers is gone


def _axes(*specs: Iterable[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """All mesh axes that are named in them, each once."""
    parts = [(part,) if isinstance(part, str) else part or () for spec in specs for part in spec]
    return tuple(dict.fromkeys(axis for part in parts for axis in part))


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
