"""How the tokens of a row lie over the devices that share it, and what chunked layers must therefore pass on.

A row is cut into equal pieces, of which a device holds one, or an early and a late one (zig-zag, see `ring.order`). Tokens
of a document follow each other in a row, so the chunk of a token began at most chunk_size - 1 tokens before it: a piece
needs so many keys from the pieces before it, wherever those are, and none from any other.

When can even that be left out? Chunks are counted in each document's own positions, and a packed document may begin
anywhere, so its chunks cross borders of pieces even where the chunk size divides the pieces. Positions are data, programs
are static: leaving the exchange out takes a promise, and `Placement.aligned` is that promise. It is kept by rows of one
document without padding before it, for which the model makes it by itself, and by packing that starts documents at
multiples of the chunk size unless they fit before the next one. `lay_out`, which sees the data, checks it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from einops import rearrange
from jax.sharding import AbstractMesh, Mesh

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import Placement, TimeOrder
from llama4_jax.kernels.attention.ring import zigzag

Array = TypeVar("Array", np.ndarray, jax.Array)


class Send(NamedTuple):
    """From the piece in `slot` of one device to another device: pairs (from, to), in each of which a device is once."""

    slot: int
    pairs: tuple[tuple[int, int], ...]


class Exchange(NamedTuple):
    """The last `tokens` of pieces travel, to each device from at most one of the sends."""

    tokens: int
    sends: tuple[Send, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """`devices` share a row in this order; `aligned` as in `Placement`."""

    devices: int = 1
    order: TimeOrder = TimeOrder.ROW
    aligned: bool = False

    @classmethod
    def of(cls, placement: Placement, mesh: Mesh | AbstractMesh) -> Layout:
        devices = partitioning.ways("time", placement, mesh)
        order = placement.order if devices > 1 else TimeOrder.ROW
        return cls(devices=devices, order=order, aligned=placement.aligned)

    @classmethod
    def in_use(cls) -> Layout:
        """Of the placement and the mesh in use."""
        mesh = partitioning.mesh_in_use()
        return cls() if mesh is None else cls.of(partitioning.placement_in_use(), mesh)

    @property
    def slots(self) -> int:
        """Pieces on one device."""
        return 2 if self.order is TimeOrder.ZIGZAG else 1

    @property
    def pieces(self) -> int:
        return self.devices * self.slots

    def holder(self, piece: int) -> tuple[int, int]:
        """The device and the slot of a piece of the row."""
        return (piece, 0) if piece < self.devices else (self.pieces - 1 - piece, 1)

    def check(self, length: int) -> None:
        """Raises ValueError for a length that does not cut into these pieces."""
        if self.order is TimeOrder.ZIGZAG:
            zigzag.piece_length(length, self.devices)
        elif length % self.devices:
            raise ValueError(f"length={length} does not cut into {self.devices} equal pieces; pad it with segment 0")

    def place(self, array: Array) -> Array:
        """[.. t] in the row's order, put into the order in which devices hold it. Raises ValueError as `ring.order`."""
        return array if self.order is TimeOrder.ROW else self._moved(array, zigzag.pieces(self.devices))

    def row(self, array: Array) -> Array:
        """The inverse of `place`."""
        return array if self.order is TimeOrder.ROW else self._moved(array, np.argsort(zigzag.pieces(self.devices)))

    def _moved(self, array: Array, order: np.ndarray) -> Array:
        self.check(array.shape[-1])
        pieces = rearrange(array, "... (n t) -> ... n t", n=self.pieces)
        return rearrange(pieces[..., order, :], "... n t -> ... (n t)")

    def exchanges(self, piece: int, chunk_size: int) -> list[Exchange]:
        """What a chunked layer needs for pieces of so many tokens; none if the promise holds and pieces are whole chunks.

        A device gets a piece once, even if both of its own need it, and none that it holds.
        """
        found, given = [], set()
        for distance in range(1, self.pieces):
            tokens = min(piece, chunk_size - 1 - (distance - 1) * piece)
            if tokens < 1:
                break
            pairs: dict[int, dict[int, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
            for target in range(distance, self.pieces):
                source = target - distance
                (sender, from_slot), (receiver, to_slot) = self.holder(source), self.holder(target)
                apart = self.aligned and ((source + 1) * piece - 1) // chunk_size != target * piece // chunk_size
                if sender == receiver or apart or (source, receiver) in given:
                    continue
                given.add((source, receiver))
                pairs[to_slot][from_slot].append((sender, receiver))
            for sends in pairs.values():
                found.append(Exchange(tokens, tuple(Send(slot, tuple(each)) for slot, each in sends.items())))
        return found


def lay_out(
    batch: Mapping[str, np.ndarray], placement: Placement, mesh: Mesh, *, chunk_size: int | None = None
) -> dict[str, np.ndarray]:
    """A batch as the loader makes it, with its tokens in the order in which the devices of `mesh` hold them.

    Every array of the shape of `batch["tokens"]`, [.. t], is put in order; others, such as images, stay. Call it once, on
    the host, before the arrays are placed; the model then needs to be told nothing but the placement (`partitioning.use`).

    chunk_size: of the chunked layers; wanted where `placement.aligned`, to check the promise.

    Raises ValueError for a broken promise, for a length that cannot be cut, and, where the order is not the row's, for a batch
    without positions, which cannot be counted any more, and for one that is laid out already.
    """
    layout = Layout.of(placement, mesh)
    if layout.order is not TimeOrder.ROW:
        require_positions(batch.get("positions"), layout)
        check_in_order(batch)
    if layout.devices > 1 and placement.aligned:
        if chunk_size is None:
            raise ValueError(
                f"placement {placement.name!r} promises aligned documents; give chunk_size to check it with"
            )
        check_aligned(batch, chunk_size)
    shape = batch["tokens"].shape
    return {name: layout.place(array) if array.shape == shape else array for name, array in batch.items()}


def require_positions(positions: Array | None, layout: Layout) -> None:
    """Raises ValueError where positions are not given and the order of tokens does not say them."""
    if positions is None and layout.order is not TimeOrder.ROW:
        raise ValueError(
            f"rows lie in {layout.order.value} order over {layout.devices} devices, so positions cannot be counted; give "
            "positions [b t], laid out with the tokens (kernels.attention.lay_out)"
        )


def check_in_order(batch: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError, naming the row, unless the tokens of each document follow each other in it, first to last.

    batch: positions [.. t], and segments, or one document a row.
    """
    length, positions = batch["tokens"].shape[-1], np.asarray(batch["positions"])
    segments = np.asarray(batch.get("segments", np.ones_like(positions)))
    for number, (row, documents) in enumerate(zip(positions.reshape(-1, length), segments.reshape(-1, length))):
        row, documents = row[documents != 0], documents[documents != 0]
        begins = np.diff(documents, prepend=0) != 0
        back = ~begins[1:] & (row[1:] <= row[:-1])
        if back.any() or len(np.unique(documents)) != begins.sum():
            raise ValueError(
                f"row {number} holds a document in parts or out of order; lay_out wants tokens in the row's own order, and is "
                "called once: train.shards.place_batch calls it too"
            )


def check_aligned(batch: Mapping[str, np.ndarray], chunk_size: int) -> None:
    """Raises ValueError, naming the place, if a chunk crosses a multiple of the chunk size in its row.

    batch: positions and segments [.. t] in the row's order; one document a row where they are missing.
    """
    length = batch["tokens"].shape[-1]
    positions = np.asarray(batch.get("positions", np.broadcast_to(np.arange(length), batch["tokens"].shape)))
    segments = np.asarray(batch.get("segments", np.ones_like(positions)))
    borders = np.arange(chunk_size, length, chunk_size)
    chunks = positions // chunk_size
    crossed = (segments[..., borders] != 0) & (segments[..., borders] == segments[..., borders - 1])
    crossed &= chunks[..., borders] == chunks[..., borders - 1]
    if crossed.any():
        *row, border = np.argwhere(crossed)[0]
        raise ValueError(
            f"a chunk of {chunk_size} positions crosses token {borders[border]} of row {', '.join(map(str, row))}, but "
            f"documents are promised to be aligned; start those that do not fit before the next multiple of {chunk_size} "
            "there, or use a placement without `aligned`"
        )
