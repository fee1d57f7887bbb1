"""Packs documents into rows of fixed length.

Documents with pictures go first, longest first, each into the row whose room it fills best (best-fit decreasing);
running text, which can be cut anywhere, then fills the room that is left. So every batch has the same number of pictures
and next to no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llama4_jax.data.documents import Document

Row = list[Document]


def fit(documents: Sequence[Document], rows: int, length: int) -> tuple[list[Row], list[Document]]:
    """Best-fit decreasing: (the documents of each row, in order; those for which no row had room).

    Raises ValueError for a document longer than a row: it would never fit.
    """
    placed: list[Row] = [[] for _ in range(rows)]
    room = [length] * rows
    left = []
    for document in sorted(documents, key=len, reverse=True):
        if len(document) > length:
            raise ValueError(
                f"a document of {len(document)} positions does not fit sequence_length={length}; "
                f"use sequence_length >= {len(document)}, or fewer names_per_image"
            )
        row = min((row for row in range(rows) if room[row] >= len(document)), key=room.__getitem__, default=None)
        if row is None:
            left.append(document)
        else:
            placed[row].append(document)
            room[row] -= len(document)
    return placed, left


def fill(rows: Sequence[Row], length: int, take: Callable[[int], Document], shortest: int) -> None:
    """Appends pieces of text, from `take(room)`, to each row while `shortest` or more positions are free."""
    for row in rows:
        room = length - sum(map(len, row))
        while room >= shortest:
            piece = take(room)
            row.append(piece)
            room -= len(piece)


def arrays(rows: Sequence[Row], length: int) -> dict[str, np.ndarray]:
    """The rows as arrays [b t]: tokens, targets, positions, segments (int32), loss_weights (float32).

    Segments count documents from 1 within a row, positions restart at 0 with each; padding has segment 0.
    """
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["loss_weights"] = np.zeros(shape, np.float32)
    for number, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row, start=1):
            place = (number, slice(start, start + len(document)))
            batch["tokens"][place] = document.inputs
            batch["targets"][place] = document.targets
            batch["loss_weights"][place] = document.weights
            batch["positions"][place] = np.arange(len(document))
            batch["segments"][place] = segment
            start += len(document)
    return batch


def pictures(rows: Sequence[Row]) -> list[int]:
    """The pictures of all documents, in order of appearance over the flattened batch."""
    return [document.picture for row in rows for document in row if document.picture is not None]
