"""A model out of named tensors and named tensors out of a model, in any `Layout`.

Tensors come from readers, objects with `shapes` and `dtypes` (name -> shape, dtype, known at once) and `read(name)`.
Several readers are the tensor-parallel shards of one checkpoint, first to last.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import Mesh

from llama4_jax.checkpoint import leaves, low_bit, mapping, tensors
from llama4_jax.checkpoint.leaves import Reader
from llama4_jax.config import Llama4Config
from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import names, partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.model import Llama4


class InMemory:
    """Tensors of a dict, as a reader."""

    def __init__(self, named: Mapping[str, np.ndarray]):
        self.shapes = {key: tensor.shape for key, tensor in named.items()}
        self.dtypes = {key: tensor.dtype for key, tensor in named.items()}
        self._named = named

    def read(self, key: str, rows: slice = mapping.ALL) -> np.ndarray:
        return self._named[key][rows] if self.shapes[key] else self._named[key]


def assemble(
    config: Llama4Config,
    layout: mapping.Layout,
    readers: Mapping[str, Reader],
    *,
    dtype: str | None,
    scan: bool,
    source: str,
    mesh: Mesh | None = None,
    placement: Placement = partitioning.TRAIN,
    quantised: Mapping[str, QuantSpec] = MappingProxyType({}),
) -> Llama4:
    """The model of `config` whose weights `readers` (label -> reader, in the order of the shards) hold in `layout`.

    Weights are converted to `dtype` (None: kept as stored), one parameter at a time, each straight into the shards
    that `placement` gives it on `mesh`, if there is one. `quantised` as in `leaves.FileLeaves`. Raises ValueError listing
    all that `source` lacks, has too much or has in another shape, and for an unknown `dtype`.
    """
    stored = leaves.FileLeaves(config, layout, readers, dtype=dtype, stacked=scan, source=source, quantised=quantised)
    abstract = leaves.abstract(config, stored.held, stacked=scan)
    structure, wanted = names.split(abstract)
    places = names.split(partitioning.shardings(abstract, placement, mesh))[1] if mesh else {}
    filled = {}
    for name, leaf in wanted.items():
        array = stored.window(low_bit.stored_name(name), leaves.whole(leaf.shape))
        filled[name] = jax.device_put(array, places.get(name))
    return structure.merge(filled)


class Tensors:
    """The parameters of `source` as `layout` names and shapes them, made when asked for.

    A tensor KEY of a parameter in few bits is in `quantised`, and made in its parts: KEY.values, KEY.scales, KEY.offsets.
    Raises ValueError if the layout does not cover the model exactly.
    """

    def __init__(self, source: leaves.Leaves, layout: mapping.Layout):
        self._source = source
        shapes = {path: shape for path, (shape, _) in source.specs.items()}
        table = mapping.entries(source.config, layout, stacked=False)
        self.quantised = {entry.key: source.held[entry.path] for entry in table if entry.path in source.held}
        table = mapping.in_parts(table, {path: how.parts for path, how in source.held.items()})
        self._parts = mapping.by_key(table)
        known = {key: parts for key, parts in self._parts.items() if all(part.path in shapes for part in parts)}
        self.shapes = {key: mapping.stored_shape(parts, shapes) for key, parts in known.items()}
        mapping.account(table, {"": self.shapes}, shapes, f"the mapping ({layout.name})")

    @property
    def specs(self) -> dict[str, tensors.Spec]:
        """Name -> shape and dtype."""
        return {key: (shape, self._source.specs[self._parts[key][0].path][1]) for key, shape in self.shapes.items()}

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        """One tensor, as the file has it, in pieces of some rows: the first axis of each, in order."""
        for part in self._parts[key]:
            shape, dtype = self._source.specs[part.path]
            box = part.covered(shape)
            axis, step = part.lead(shape)
            width = step * math.prod(self.shapes[key][1:]) * dtype.itemsize
            for piece in leaves.pieces(box[axis], width):
                window = self._source.window(part.path, mapping.with_part(box, axis, piece))
                yield part.block_to_file(window)

    def make(self, key: str) -> np.ndarray:
        """One tensor, as the file has it."""
        made = list(self.pieces(key))
        return made[0] if len(made) == 1 else np.concatenate(made)


def main_dtype(source: leaves.Leaves) -> str:
    """The dtype of most weights, or of what they stand for. Others (an fp32 router) are stored as they are all the same."""
    sizes: Counter[str] = Counter()
    for name, (shape, dtype) in source.specs.items():
        path, part = low_bit.split(name, source.held)
        if part in (None, "values"):
            sizes[str(dtype) if part is None else source.held[path].dtype] += math.prod(shape)
    return sizes.most_common(1)[0][0]
