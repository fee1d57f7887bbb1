"""The parameters of a model, asked for box by box: out of files in some layout, or out of a model in memory.

A box is a start and a stop on every axis. Whoever streams asks for boxes, so that neither a checkpoint nor its largest
tensor has to fit in memory: readers read the rows that a box needs, in pieces of about `PIECE_BYTES`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama4_jax.checkpoint import low_bit, mapping, tensors
from llama4_jax.checkpoint.low_bit import Held
from llama4_jax.config import Llama4Config
from llama4_jax.config.quant import QuantSpec
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model import Llama4

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")
PIECE_BYTES = 1 << 26
ALIGNMENT = 64  # bytes


class Reader(Protocol):
    """Named tensors of one file or folder."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def read(self, key: str, rows: slice = mapping.ALL) -> np.ndarray: ...  # rows: of the first axis


class Leaves(Protocol):
    """The parameters of a model of `config`, by dotted path; those in few bits as the arrays that `low_bit` makes of them."""

    config: Llama4Config
    specs: Mapping[str, tensors.Spec]  # path -> shape and dtype
    held: Mapping[str, Held]  # how parameters in few bits are held

    def window(self, path: str, box: mapping.Box) -> np.ndarray: ...

    def axis(self, path: str) -> int: ...  # along which windows are cheap


class FileLeaves:
    """Parameters out of the tensors that hold their parts; `readers` (label -> reader) are shards, first to last.

    Values are converted to `dtype` (None: as stored). `stacked` tells how the model holds its decoder (`mapping`).
    `quantised` (key -> spec) are tensors that readers have in parts (`quantised.Kept`): so are their parameters, which then
    stand for arrays of `dtype`. Raises ValueError listing all that `source` lacks, has too much or has in another shape, and
    for an unknown `dtype` or, without one, for a parameter that is stored in several.
    """

    def __init__(
        self,
        config: Llama4Config,
        layout: mapping.Layout,
        readers: Mapping[str, Reader],
        *,
        dtype: str | None,
        stacked: bool,
        source: str,
        quantised: Mapping[str, QuantSpec] = MappingProxyType({}),
    ):
        check_dtype(dtype)
        stored = {label: {key: r.shapes[key] for key in layout.kept(r.shapes)} for label, r in readers.items()}
        names = set().union(*stored.values())
        prefix = _text_prefix(config, layout, names)
        table = mapping.entries(config, layout, stacked=stacked, names=names, text_prefix=prefix)
        self.held = _held(table, quantised, readers, dtype)
        table = mapping.in_parts(table, {path: how.parts for path, how in self.held.items()})
        shapes = low_bit.in_parts(parameter_shapes(config, stacked=stacked), self.held)
        mapping.account(table, stored, shapes, source)
        self.config = config
        self._readers, self._shapes, self._parts = list(readers.values()), shapes, mapping.by_key(table)
        self._sources: dict[str, list[mapping.Entry]] = {}
        for entry in table:
            self._sources.setdefault(entry.path, []).append(entry)
        self.specs = {path: (shape, self._dtype(path, dtype)) for path, shape in shapes.items()}
        self._compared: set[str] = set()

    def window(self, path: str, box: mapping.Box) -> np.ndarray:
        """A part of the parameter `path`."""
        out = empty(tuple(part.stop - part.start for part in box), self.specs[path][1])
        for entry in self._sources[path]:
            for shard in range(len(self._readers)) if entry.split else (0,):
                self._copy(entry, shard, box, out)
            if not entry.split:
                self._compare_replicas(entry.key)
        return out

    def axis(self, path: str) -> int:
        """Along which axis windows read nothing that they do not need."""
        entry = self._sources[path][0]
        if entry.index and entry.index[0] != mapping.ALL:  # a tensor for each expert or layer
            return 0
        return entry.lead(self._shapes[path], len(self._readers))[0]

    def _copy(self, entry: mapping.Entry, shard: int, box: mapping.Box, out: np.ndarray) -> None:
        """Puts into `out`, which is `box` of the parameter, what shard `shard` of one tensor has of it."""
        shape, shards, reader = self._shapes[entry.path], len(self._readers), self._readers[shard]
        held = entry.covered(shape, shard, shards)
        shared = mapping.intersection(held, box)
        if shared is None:
            return
        axis, step = entry.lead(shape, shards)
        offset = mapping.rows(self._parts[entry.key], entry, self._shapes, shards).start or 0
        width = step * math.prod(reader.shapes[entry.key][1:]) * reader.dtypes[entry.key].itemsize
        for piece in pieces(shared[axis], width):
            first, last = (offset + (end - held[axis].start) * step for end in (piece.start, piece.stop))
            block = entry.to_leaf(reader.read(entry.key, slice(first, last)), shape, shards)
            wanted, got = (mapping.with_part(part, axis, piece) for part in (shared, held))
            out[mapping.within(wanted, box)] = block[mapping.within(wanted, got)]

    def _dtype(self, path: str, dtype: str | None) -> np.dtype:
        if dtype is not None and low_bit.split(path, self.held)[1] is None:
            return jnp.dtype(dtype)
        stored = [(entry.key, reader.dtypes[entry.key]) for entry in self._sources[path] for reader in self._readers]
        if len({found for _, found in stored}) > 1:
            names = [f"{key}: {found}" for key, found in stored]
            raise ValueError(f"dtype=None, but one parameter is stored in several dtypes ({names}); name a dtype")
        return stored[0][1]

    def _compare_replicas(self, key: str) -> None:
        """Shards should agree on what each holds whole. The original loader uses each shard's own: so a warning."""
        if len(self._readers) == 1 or key in self._compared:
            return
        self._compared.add(key)
        first = self._readers[0].read(key)
        for shard, reader in enumerate(self._readers[1:], start=1):
            if not np.array_equal(reader.read(key), first):
                logger.warning("%s differs between shard 0 and shard %d; using that of shard 0", key, shard)


class ModelLeaves:
    """The parameters of a model in memory, layer by layer even where it holds them stacked."""

    def __init__(self, model: Llama4):
        self.config = model.config
        self._arrays, held = {}, {}
        for path, parameter in nnx.to_flat_state(nnx.state(model)):
            name, array = _dotted(path), parameter.get_value()
            if isinstance(array, QuantizedArray):
                held[name] = low_bit.held(name, array)
                self._arrays |= {f"{name}.{part}": getattr(array, part) for part in held[name].parts}
            else:
                self._arrays[name] = array
        self._homes = mapping.unstacked(model.config, self._arrays)
        self.held = low_bit.alone(self._homes, held)
        self.specs = {
            path: (self._arrays[home].shape[len(index) :], np.dtype(self._arrays[home].dtype))
            for path, (home, index) in self._homes.items()
        }

    def window(self, path: str, box: mapping.Box) -> np.ndarray:
        home, index = self._homes[path]
        return np.asarray(self._arrays[home])[index][box]

    def axis(self, path: str) -> int:
        return 0


def abstract(config: Llama4Config, held: Mapping[str, Held], *, stacked: bool) -> Llama4:
    """A model of `config` without its numbers, whose parameters in `held` are in few bits."""
    graph, state = nnx.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan=stacked)))
    filled = []
    for path, parameter in nnx.to_flat_state(state):
        name = _dotted(path)
        few = low_bit.abstract(name, parameter.shape, held[name]) if name in held else None
        filled.append((path, parameter if few is None else parameter.replace(few)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def parameter_shapes(config: Llama4Config, *, stacked: bool) -> dict[str, mapping.Shape]:
    """The shape of every parameter of a model of `config`; nothing is allocated."""
    state = nnx.state(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan=stacked)))
    return {_dotted(path): parameter.shape for path, parameter in nnx.to_flat_state(state)}


def whole(shape: mapping.Shape) -> mapping.Box:
    """The box that is all of a parameter."""
    return tuple(slice(0, size) for size in shape)


def pieces(span: slice, width: int) -> Iterator[slice]:
    """`span` in parts of about PIECE_BYTES, given the bytes of one step."""
    stride = max(1, PIECE_BYTES // max(1, width))
    for start in range(span.start, span.stop, stride):
        yield slice(start, min(start + stride, span.stop))


def empty(shape: mapping.Shape, dtype: np.dtype) -> np.ndarray:
    """An array without values whose memory JAX takes over on a CPU, as only aligned memory is, instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError unless weights may be asked for in `dtype`."""
    if dtype is not None and str(dtype) not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; wanted one of {', '.join(DTYPES)}, or None to keep what is stored")


def _held(
    table: list[mapping.Entry],
    quantised: Mapping[str, QuantSpec],
    readers: Mapping[str, Reader],
    dtype: str | None,
) -> dict[str, Held]:
    """How each parameter is held whose tensors are in `quantised`: all of them, and all alike."""
    found: dict[str, dict[str, QuantSpec | None]] = {}
    for entry in table:
        found.setdefault(entry.path, {})[entry.key] = quantised.get(entry.key)
    few = {path: specs for path, specs in found.items() if any(specs.values())}
    examples = {path: {spec: key for key, spec in specs.items()} for path, specs in few.items()}
    problems = [
        f"{path}: " + "; ".join(f"{key} is {spec or 'not quantised'}" for spec, key in keys.items())
        for path, keys in examples.items()
        if len(keys) > 1
    ]
    if problems:
        raise ValueError(
            "parameters whose tensors are quantised in several ways cannot be kept in few bits; load them dequantised, "
            "or with scan=False:\n  " + "\n  ".join(problems)
        )
    reader = next(iter(readers.values()))
    stored = {path: str(reader.dtypes[f"{next(iter(specs))}.scales"]) for path, specs in few.items()}
    return {path: Held(next(iter(specs.values())), dtype or stored[path]) for path, specs in few.items()}


def _text_prefix(config: Llama4Config, layout: mapping.Layout, names) -> str | None:
    """Text-only weights are also found under the multimodal prefix, when they were cut out of a multimodal file."""
    cut_out = config.vision is None and names and all(name.startswith(layout.text_prefix) for name in names)
    return layout.text_prefix if cut_out else None


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
