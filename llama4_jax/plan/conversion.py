"""A released checkpoint's weights as a model's parameters, as one program: what a conversion asks of the devices.

Each device is given the part of each tensor that its shards of the parameters are made of, in bfloat16 and in the order of
Hugging Face's files; the program brings it into the order, the dtype and the place of the parameters. Nothing is exchanged.
All parameters are there at once, beside all tensors: a bound, for who goes through them one by one needs less.

`checkpoint.load_hf` makes the same change on the hosts, each of which reads the files whole. `read_by_host` says what a host
would read for its own devices alone.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama4_jax.checkpoint import layouts, mapping
from llama4_jax.checkpoint.mapping import ALL, Entry
from llama4_jax.config import Llama4Config
from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.plan import programs


def lower(config: Llama4Config, mesh: Mesh, *, placement: Placement = partitioning.TRAIN) -> programs.Step:
    """The program; parameters are float32, as training holds them, or bfloat16 where `placement` is SERVE."""
    _, params = programs.abstract_params(config, dtype(placement), placement, mesh)
    table = mapping.entries(config, layouts.HF_FUSED, stacked=True)
    named = {entry.key: _placed(entry, params[entry.path]) for entry in table}
    places = {path: leaf.sharding for path, leaf in params.items()}
    jitted = jax.jit(functools.partial(assemble, table=table, params=params), out_shardings=places)
    with jax.set_mesh(mesh):
        return programs.Step(jitted.lower(named), {"checkpoint": named, "parameters": params})


def dtype(placement: Placement) -> jnp.dtype:
    """What a parameter is made in."""
    return jnp.dtype("bfloat16" if placement == partitioning.SERVE else "float32")


def assemble(
    named: Mapping[str, jax.Array], table: Sequence[Entry], params: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Parameters of the shapes and dtypes of `params`, out of tensors of a file in the form of `opened`."""
    filled = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    for entry in table:
        leaf = filled[entry.path]
        block = rearrange(named[entry.key], _pattern(entry)).astype(leaf.dtype)
        fixed = tuple(axis for axis in range(leaf.ndim) if axis not in _axes(entry, leaf).values())
        starts = [part.start for part in entry.covered(leaf.shape)]
        filled[entry.path] = jax.lax.dynamic_update_slice(leaf, jnp.expand_dims(block, fixed), starts)
    return filled


def opened(entry: Entry, leaf) -> tuple[int, ...]:
    """The shape of the tensor of `entry` in its file with joined axes apart, as "(n h) d" is "n h d": the same bytes."""
    axes = _axes(entry, leaf)
    return tuple(leaf.shape[axes[letter]] for letter in _letters(entry))


def read_by_host(named: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes that the host with most to read reads, if each reads once what its own devices are given of the files."""
    totals = Counter()
    for (shape, dtype, sharding), number in Counter(
        (leaf.shape, leaf.dtype, leaf.sharding) for leaf in named.values()
    ).items():
        part = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        places = sharding.devices_indices_map(shape).items()
        for host, _ in {(device.process_index, str(place)) for device, place in places}:
            totals[host] += number * part
    return max(totals.values())


def _placed(entry: Entry, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The tensor of `entry`, cut as the parameter that it fills."""
    axes, spec = _axes(entry, leaf), [*leaf.sharding.spec] + [None] * leaf.ndim
    cut = PartitionSpec(*(spec[axes[letter]] for letter in _letters(entry)))
    return jax.ShapeDtypeStruct(opened(entry, leaf), jnp.bfloat16, sharding=NamedSharding(leaf.sharding.mesh, cut))


def _letters(entry: Entry) -> list[str]:
    """Axes of the tensor in its file, joined ones apart."""
    return re.findall(r"\w+", entry.pattern.split(" -> ")[0])


def _pattern(entry: Entry) -> str:
    return " -> ".join([" ".join(_letters(entry)), entry.pattern.split(" -> ")[1]])


def _axes(entry: Entry, leaf) -> dict[str, int]:
    """Which axis of the parameter each letter is."""
    index = entry.index + (ALL,) * (leaf.ndim - len(entry.index))
    return dict(zip(entry.pattern.split(" -> ")[1].split(), [axis for axis, part in enumerate(index) if part == ALL]))
