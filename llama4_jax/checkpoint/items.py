"""One array as an Orbax item {"array": ...}, written block by block, read by any part, and checked.

Orbax's own handlers want an array whole, and copy it while the disk is slow; here Orbax is taught a kind of leaf that
comes in blocks. What lies on disk is an item as any other, in uncompressed zarr chunks of at most CHUNK_BYTES, that Orbax
restores into any sharding. Reading is by tensorstore, with which Orbax reads too, because Orbax restores whole arrays only.

Neither has numbers of four bits: they would take a byte each. int4 arrays are bytes on disk, with two numbers each along the
last axis (`packing`), and an attribute of the zarr array says how many numbers there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from llama4_jax.checkpoint import mapping, packing, tensors
from llama4_jax.checkpoint.leaves import pieces, whole

CHUNK_BYTES = 1 << 24
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
PAIRS = "int4_along_last_axis"  # the attribute: how many
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}]

Record = dict[str, Any]  # what tells whether an array is the same: shape, dtype, crc32, sum


class Checksums:
    """What tells whether an array is the same, of its chunks in whatever order: `crc32` and `sum`.

    Of int4, chunks are those of the bytes that hold `pairs` numbers along the last axis, and the sum is that of the numbers'
    bits, wherever they lie in a byte.
    """

    def __init__(self, pairs: int | None = None):
        self.crc32 = self.sum = 0
        self._pairs = pairs

    def add(self, box: mapping.Box, block: np.ndarray, chunk: mapping.Shape) -> None:
        """Counts `block`, which is `box` of the array and made of whole chunks."""
        for part in _grid(box, chunk):
            flat = np.ascontiguousarray(block[mapping.within(part, box)]).reshape(-1)
            place = repr([each.start for each in part]).encode()
            self.crc32 = (self.crc32 + zlib.crc32(flat.view(np.uint8), zlib.crc32(place))) % 2**32
            words = flat.view(WORDS[flat.dtype.itemsize])
            halves = [words] if self._pairs is None else [words & 15, words >> 4]
            self.sum = (self.sum + sum(int(half.sum(dtype=np.uint64)) for half in halves)) % 2**32

    def record(self, shape: mapping.Shape, dtype: np.dtype) -> Record:
        """Of the chunks counted, which are all of an array of `shape` and `dtype` on disk."""
        if self._pairs is not None:
            shape, dtype = (*shape[:-1], self._pairs), packing.INT4
        return {"shape": list(shape), "dtype": str(dtype), "crc32": self.crc32, "sum": self.sum}


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array on its way to disk, block by block: `window(box)` makes any part of it, cheaply along `axis`.

    pairs: how many int4 lie along the last axis of an array of bytes that hold two each; None: it is what it is.
    """

    shape: mapping.Shape
    dtype: np.dtype
    axis: int
    window: Callable[[mapping.Box], np.ndarray]
    checksums: Checksums
    pairs: int | None = None

    @classmethod
    def of(cls, spec: tensors.Spec, axis: int, window: Callable[[mapping.Box], np.ndarray]) -> Streamed:
        """The array that `window` makes, as it is stored."""
        shape, dtype = spec
        if dtype != packing.INT4:
            return cls(shape, dtype, axis, window, Checksums())
        size = shape[-1]

        def packed(box: mapping.Box) -> np.ndarray:
            pairs = slice(2 * box[-1].start, min(2 * box[-1].stop, size))
            return packing.pack_pairs(window((*box[:-1], pairs)))

        return cls((*shape[:-1], -(-size // 2)), np.dtype(np.uint8), axis, packed, Checksums(size), size)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk(self) -> mapping.Shape:
        """The shape of what is stored together, of at most CHUNK_BYTES: some steps of `axis`, or a part of one."""
        shape = list(self.shape)
        step = self.nbytes // shape[self.axis]
        shape[self.axis] = min(shape[self.axis], max(1, CHUNK_BYTES // step))
        while math.prod(shape) * self.dtype.itemsize > CHUNK_BYTES:
            widest = shape.index(max(shape))
            shape[widest] = -(-shape[widest] // 2)
        return tuple(shape)

    @property
    def attributes(self) -> dict[str, Any]:
        """What is written beside the array."""
        return {} if self.pairs is None else {"metadata": {"attributes": {PAIRS: self.pairs}}}

    def blocks(self) -> Iterator[mapping.Box]:
        """The whole in parts of whole chunks, in the order of `axis`."""
        step = self.chunk[self.axis]
        for piece in pieces(slice(0, -(-self.shape[self.axis] // step)), step * self.nbytes // self.shape[self.axis]):
            span = slice(piece.start * step, min(piece.stop * step, self.shape[self.axis]))
            yield mapping.with_part(whole(self.shape), self.axis, span)


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Teaches Orbax to write a `Streamed`, as one array that it reads back as any other."""

    def memory_size(self, values: Sequence[Streamed]) -> Sequence[tuple[int, int]]:
        return [(value.nbytes, value.nbytes) for value in values]

    async def serialize(self, values: Sequence[Streamed], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        for value, info in zip(values, infos):
            await info.await_path_creation()
            kvstore = {"driver": "file", "path": f"{info.parent_dir / info.name}/"}
            array = await tensorstore.open(
                # Zeros are stored as well: a chunk that is not there is always one that was lost.
                {"driver": "zarr3", "kvstore": kvstore, "store_data_equal_to_fill_value": True} | value.attributes,
                create=True,
                dtype=value.dtype.name,
                shape=value.shape,
                chunk_layout=tensorstore.ChunkLayout(chunk_shape=value.chunk),
                codec=tensorstore.CodecSpec({"driver": "zarr3", "codecs": CODECS}),
            )
            for box in value.blocks():
                block = value.window(box)
                value.checksums.add(box, block, value.chunk)
                await array[box].write(block, can_reference_source_data_indefinitely=True)
        return []


class Writer:
    """Writes items, one at a time. Use it as a context manager."""

    def __init__(self):
        registry = ocp.type_handlers.create_type_handler_registry((Streamed, _StreamedHandler()))
        with _without_warnings():
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
            self._checkpointer = ocp.Checkpointer(handler)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    def write(
        self, item: pathlib.Path, spec: tensors.Spec, axis: int, window: Callable[[mapping.Box], np.ndarray]
    ) -> Record:
        """Writes the array of which `window` makes any part, over what was there; returns its record.

        Blocks are divided along `axis`. The item appears when it is complete.
        """
        streamed = Streamed.of(spec, axis, window)
        save = ocp.args.PyTreeSave({"array": streamed})
        with _without_warnings():
            self._checkpointer.save(item.absolute(), args=save, force=True)
        return streamed.checksums.record(streamed.shape, streamed.dtype)


def stored_record(item: pathlib.Path) -> Record:
    """The record of an item as it is on disk now; raises ValueError where it cannot be read."""
    array, checksums = open_array(item), Checksums(_pairs(item))
    chunk = array.chunk_layout.read_chunk.shape
    try:
        for box in _grid(whole(array.shape), chunk):
            checksums.add(box, array[box].read().result(), chunk)
    except ValueError as error:
        raise ValueError(f"{item} cannot be read: {error}") from error
    return checksums.record(array.shape, array.dtype.numpy_dtype)


def read(item: pathlib.Path, box: mapping.Box) -> np.ndarray:
    """A part of the array of an item."""
    if _pairs(item) is None:
        return open_array(item)[box].read().result()
    last = box[-1]
    held = slice(last.start // 2, -(-last.stop // 2))
    packed = open_array(item)[(*box[:-1], held)].read().result()
    return packing.unpack_pairs(packed, last.stop - 2 * held.start)[..., last.start - 2 * held.start :]


def _pairs(item: pathlib.Path) -> int | None:
    """How many int4 lie along the last axis of an item's bytes; None where they are not int4."""
    return json.loads(_metadata(item).read_text()).get("attributes", {}).get(PAIRS)


def _metadata(item: pathlib.Path) -> pathlib.Path:
    path = item / "array" / "zarr.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} is missing; the checkpoint is incomplete, copy it again")
    return path


def open_array(item: pathlib.Path) -> tensorstore.TensorStore:
    """The array of an item as it is on disk, of which any part can be read."""
    kvstore = {"driver": "file", "path": f"{_metadata(item).parent.absolute()}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}).result()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns with each item that it merges no OCDBT files and sees no jax.Array, both by design; errors it raises.

    By the level, because absl's logger asks no filter.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _grid(box: mapping.Box, chunk: mapping.Shape) -> Iterator[mapping.Box]:
    """The chunks in a box that starts with one."""
    axes = [
        [slice(at, min(at + step, part.stop)) for at in range(part.start, part.stop, step)]
        for part, step in zip(box, chunk)
    ]
    return itertools.product(*axes)
