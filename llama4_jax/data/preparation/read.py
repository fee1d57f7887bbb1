"""Prepared text as sources for the loader: what `data.text.sources` is for the standard library.

streams = {"prepared": TextStream(read.sources("runs/text"), tokenizer, seed=0)}
"""

from __future__ import annotations

import functools
import json
import pathlib

from array_record.python.array_record_module import ArrayRecordReader

from llama4_jax.data.preparation.ledger import describe
from llama4_jax.data.text import Source

MANIFEST = "manifest.json"


def manifest(folder: str | pathlib.Path) -> dict:
    """What was prepared, from what and under which licences. Raises ValueError for a preparation that never ended."""
    path = pathlib.Path(folder) / MANIFEST
    if not path.exists():
        raise ValueError(f"wanted {path}, got no such file: run `python -m experiments.prepare_text` to its end")
    return json.loads(path.read_text(encoding="utf-8"))


def verify(folder: str | pathlib.Path) -> None:
    """Raises ValueError when a shard is not the one that the manifest describes."""
    for shard in manifest(folder)["shards"]:
        check(folder, shard)


def check(folder: str | pathlib.Path, shard: dict) -> None:
    """The same of one shard, given as in the manifest."""
    path = pathlib.Path(folder) / shard["file"]
    found = describe(path, shard["file"]) if path.exists() else {"sha256": None}
    if found["sha256"] != shard["sha256"]:
        raise ValueError(
            f"{path}: wanted sha256 {shard['sha256']}, got {found['sha256']}; copy the shard again, or prepare anew"
        )


def sources(folder: str | pathlib.Path) -> tuple[Source, ...]:
    """Every document, in the order of the shards, read when asked for.

    A name has the hash of its shard in it, so a loader's state belongs to these very documents.
    """
    return tuple(
        Source(f"{shard['sha256'][:12]}/{row}", functools.partial(_text, str(pathlib.Path(folder, shard["file"])), row))
        for shard in manifest(folder)["shards"]
        for row in range(shard["documents"])
    )


def record(path: str | pathlib.Path, row: int) -> dict:
    """One record of a shard, with all its fields; see `annotate`."""
    changed = pathlib.Path(path).stat().st_mtime_ns  # a file that was written anew is another one
    return json.loads(_reader(str(path), changed).read([row])[0])


def _text(path: str, row: int) -> str:
    return record(path, row)["text"]


@functools.lru_cache(maxsize=64)
def _reader(path: str, _: int) -> ArrayRecordReader:
    # Single records in any order: no reading ahead.
    return ArrayRecordReader(path, "readahead_buffer_size:0", file_reader_buffer_size=32768)
