"""A model out of named tensors and named tensors out of a model, in any `Layout`.

Tensors come from readers, objects with `shapes` and `dtypes` (name -> shape, dtype, known at once) and `read(name)`.
Several readers are the tensor-parallel shards of one checkpoint, first to last.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama4_jax.checkpoint import mapping, tensors
from llama4_jax.config import Llama4Config
from llama4_jax.core import names, partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.model import Llama4

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")


class Reader(Protocol):
    """Named tensors of one file or folder."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def read(self, key: str, rows: slice = mapping.ALL) -> np.ndarray: ...  # rows: of the first axis


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
) -> Llama4:
    """The model of `config` whose weights `readers` (label -> reader, in the order of the shards) hold in `layout`.

    Weights are converted to `dtype` (None: kept as stored), one parameter at a time, each straight into the shards
    that `placement` gives it on `mesh`, if there is one. Raises ValueError listing all that `source` lacks, has too
    much or has in another shape, and for an unknown `dtype`.
    """
    if dtype is not None and str(dtype) not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; wanted one of {', '.join(DTYPES)}, or None to keep what is stored")
    abstract = jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan=scan))
    graph, state = nnx.split(abstract)
    places = names.split(partitioning.shardings(abstract, placement, mesh))[1] if mesh else {}
    shapes = {_dotted(path): parameter.shape for path, parameter in nnx.to_flat_state(state)}
    stored = {label: {key: r.shapes[key] for key in layout.kept(r.shapes)} for label, r in readers.items()}
    keys = set().union(*stored.values())
    table = mapping.entries(config, layout, stacked=scan, names=keys, text_prefix=_text_prefix(config, layout, keys))
    mapping.account(table, stored, shapes, source)
    filler = _Filler(mapping.by_key(table), shapes, list(readers.values()), dtype)
    filled = []
    for path, parameter in nnx.to_flat_state(state):
        name = _dotted(path)
        filled.append((path, parameter.replace(jax.device_put(filler.fill(name), places.get(name)))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


class Tensors:
    """The weights of `model` as `layout` names and shapes them, made when asked for.

    Raises ValueError if the layout does not cover the model exactly.
    """

    def __init__(self, model: Llama4, layout: mapping.Layout):
        self._leaves = {_dotted(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
        shapes = {path: leaf.shape for path, leaf in self._leaves.items()}
        stacked = any(path.startswith("decoder.period.") for path in shapes)
        table = mapping.entries(model.config, layout, stacked=stacked)
        self._parts = mapping.by_key(table)
        known = {key: parts for key, parts in self._parts.items() if all(part.path in shapes for part in parts)}
        self.shapes = {key: mapping.stored_shape(parts, shapes) for key, parts in known.items()}
        mapping.account(table, {"": self.shapes}, shapes, f"the mapping ({layout.name})")

    @property
    def specs(self) -> dict[str, tensors.Spec]:
        """Name -> shape and dtype."""
        return {
            key: (shape, np.dtype(self._leaves[self._parts[key][0].path].dtype)) for key, shape in self.shapes.items()
        }

    def make(self, key: str) -> np.ndarray:
        """One tensor, as the file has it."""
        made = [part.to_file(np.asarray(self._leaves[part.path])) for part in self._parts[key]]
        return made[0] if len(made) == 1 else np.concatenate(made)


def main_dtype(model: Llama4) -> str:
    """The dtype of most weights. Others (an fp32 router) are stored as they are all the same."""
    sizes: Counter[str] = Counter()
    for leaf in jax.tree.leaves(model):
        sizes[str(leaf.dtype)] += leaf.size
    return sizes.most_common(1)[0][0]


class _Filler:
    """Makes whole parameters out of the tensors that hold their parts."""

    def __init__(
        self,
        parts: dict[str, list[mapping.Entry]],
        shapes: Mapping[str, mapping.Shape],
        readers: Sequence[Reader],
        dtype: str | None,
    ):
        self._parts, self._shapes, self._readers, self._dtype = parts, shapes, readers, dtype
        self._sources: dict[str, list[mapping.Entry]] = {}
        for entries in parts.values():
            for entry in entries:
                self._sources.setdefault(entry.path, []).append(entry)

    def fill(self, path: str) -> np.ndarray:
        """The parameter `path`."""
        sources = self._sources[path]
        leaf = np.empty(self._shapes[path], jnp.dtype(self._dtype) if self._dtype else self._stored_dtype(sources))
        for entry in sources:
            for shard in range(len(self._readers)) if entry.split else (0,):
                entry.fill(leaf, self._read(entry, shard), shard, len(self._readers))
            if not entry.split:
                self._check_replicas(entry)
        return leaf

    def _read(self, entry: mapping.Entry, shard: int) -> np.ndarray:
        rows = mapping.rows(self._parts[entry.key], entry, self._shapes, len(self._readers))
        return self._readers[shard].read(entry.key)[rows]

    def _stored_dtype(self, sources: list[mapping.Entry]) -> np.dtype:
        stored = {reader.dtypes[entry.key] for entry in sources for reader in self._readers}
        if len(stored) > 1:
            found = [f"{entry.key}: {reader.dtypes[entry.key]}" for entry in sources for reader in self._readers]
            raise ValueError(f"dtype=None, but one parameter is stored in several dtypes ({found}); name a dtype")
        return stored.pop()

    def _check_replicas(self, entry: mapping.Entry) -> None:
        """Shards should agree on what each holds whole. The original loader uses each shard's own: so a warning."""
        first = self._readers[0].read(entry.key) if len(self._readers) > 1 else None
        for shard, reader in enumerate(self._readers[1:], start=1):
            if not np.array_equal(reader.read(entry.key), first):
                logger.warning("%s differs between shard 0 and shard %d; using that of shard 0", entry.key, shard)


def _text_prefix(config: Llama4Config, layout: mapping.Layout, names) -> str | None:
    """Text-only weights are also found under the multimodal prefix, when they were cut out of a multimodal file."""
    cut_out = config.vision is None and names and all(name.startswith(layout.text_prefix) for name in names)
    return layout.text_prefix if cut_out else None


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
