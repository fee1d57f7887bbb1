"""Records on disk: shards in the ArrayRecord format, the same bytes for the same records, each there whole or not at all.

Groups have one record each: grain reads single records, in any order.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter


def write(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """Writes `records` in order, under a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    temporary.replace(path)


def read(path: str | pathlib.Path, rows: Sequence[int]) -> list[bytes]:
    """The records at `rows`, in that order."""
    reader = ArrayRecordReader(str(path))
    try:
        return reader.read(list(rows)) if len(rows) else []
    finally:
        reader.close()


def cut(sizes: np.ndarray, limit: int) -> list[slice]:
    """Runs of documents of these sizes, in bytes, for shards of about `limit`: at least one run, none of them empty.

    The fewest shards that keep to the limit on average; each ends with the document that crosses its share.
    """
    if not len(sizes):
        return []
    ends = np.cumsum(sizes)
    count = max(-(-int(ends[-1]) // limit), 1)
    shard = np.minimum((ends - 1) * count // max(int(ends[-1]), 1), count - 1)
    edges = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(sizes)]
    return [slice(start, stop) for start, stop in zip(edges[:-1], edges[1:])]
