"""Named attention calls, shared by tests (the small ones) and benchmarks (the sizes of real models)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of one call, and where its tokens stand.

    Rows of the batch are alike unless `documents` or `left_padding` has several entries, which rows take in turn.
    """

    batch: int
    query_length: int  # the last tokens of a row
    key_length: int  # cache slots, or the same tokens as the queries
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int | None = None
    documents: tuple[tuple[int, ...], ...] = ()  # lengths of the documents packed in a row, from its first token
    left_padding: tuple[int, ...] = (0,)  # tokens of padding before a row's document
    empty_slots: tuple[int, ...] = (0,)  # cache slots at a row's end that hold nothing yet

    def tokens(self) -> dict[str, np.ndarray]:
        """Positions and segments of queries [b t] and keys [b s], under the names that `api.attend` takes."""
        rows = [self._row(i) for i in range(self.batch)]
        positions, segments = (np.stack(x).astype(np.int32) for x in zip(*rows))
        ends = [self.key_length - self._turn(self.empty_slots, i) for i in range(self.batch)]
        query_slots = np.array(ends)[:, None] - self.query_length + np.arange(self.query_length)  # [b t]
        return {
            "query_positions": np.take_along_axis(positions, query_slots, axis=1),
            "key_positions": positions,
            "query_segments": np.take_along_axis(segments, query_slots, axis=1),
            "key_segments": segments,
        }

    def arrays(self, seed: int = 0, dtype=jnp.float32) -> dict[str, jax.Array]:
        """Query [b t n h], key and value [b s k h], drawn from the unit normal distribution."""
        query = (self.batch, self.query_length, self.heads, self.head_dim)
        key = (self.batch, self.key_length, self.kv_heads, self.head_dim)
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = {"query": query, "key": key, "value": key}
        return {name: jax.random.normal(k, shape, dtype) for k, (name, shape) in zip(keys, shapes.items())}

    @staticmethod
    def _turn(entries: tuple, row: int):
        return entries[row % len(entries)] if entries else ()

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and segments of one row's keys."""
        padding, empty = self._turn(self.left_padding, row), self._turn(self.empty_slots, row)
        live = self.key_length - padding - empty
        lengths = [*self._turn(self.documents, row)] or [live]
        rest = live - sum(lengths)
        if rest < 0:
            raise ValueError(f"documents {lengths} need {sum(lengths)} tokens; row {row} has room for {live}")
        positions = np.concatenate([np.zeros(padding), *map(np.arange, lengths), np.zeros(rest), np.full(empty, -1)])
        numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        # An empty slot keeps the row's segment: that its position is -1 must be enough.
        return positions, np.concatenate([np.zeros(padding), numbers, np.zeros(rest), np.ones(empty)])


def _square(length: int, **sizes) -> Workload:
    """Every token of a row is a query and a key."""
    return Workload(query_length=length, key_length=length, **sizes)


_SMALL = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
SMALL = {
    "causal": _square(50, **_SMALL),
    "several_chunks": _square(50, chunk_size=16, **_SMALL),
    "chunk_divides_no_block": _square(61, chunk_size=7, **_SMALL),
    "packed": _square(64, chunk_size=16, documents=((40, 24), (5, 1, 30, 20)), **_SMALL),
    "packed_global": _square(64, documents=((40, 24), (5, 1, 30, 20)), **_SMALL),
    "left_padded": _square(45, chunk_size=16, left_padding=(0, 13), **_SMALL),
    "decode": Workload(query_length=1, key_length=48, chunk_size=16, empty_slots=(9, 31), **_SMALL),
    "decode_global": Workload(query_length=1, key_length=48, empty_slots=(0, 47), **_SMALL),
    "chunked_prefill": Workload(query_length=11, key_length=48, chunk_size=16, empty_slots=(3, 20), **_SMALL),
    "one_kv_head_each": _square(33, batch=1, heads=3, kv_heads=3, head_dim=8),
    "five_heads_a_group": _square(33, batch=1, heads=10, kv_heads=2, head_dim=8),
    "one_token": _square(1, batch=1, heads=2, kv_heads=1, head_dim=8),
}
"""Small enough for every test; each has a trap of its own."""

SEQUENCES = {
    "aligned": _square(61, chunk_size=16, documents=((40, 8, 10), (32, 16, 5, 6)), **_SMALL),  # see `Rows.ALIGNED`
    "several_blocks": _square(300, chunk_size=90, documents=((170, 120), (3, 280)), left_padding=(10, 0), **_SMALL),
    "several_blocks_global": _square(300, documents=((170, 120), (3, 280)), left_padding=(10, 0), **_SMALL),
}
"""Rows that attend to themselves; those of several blocks are longer than the smallest that TPUs' kernels have."""

REAL = {
    "nano_train": _square(256, batch=16, heads=4, kv_heads=2, head_dim=32, chunk_size=64),
    "bench_151m_prefill": _square(1024, batch=1, heads=8, kv_heads=2, head_dim=64, chunk_size=8192),
    "bench_151m_train": _square(512, batch=4, heads=8, kv_heads=2, head_dim=64, chunk_size=8192),
    "bench_151m_decode": Workload(
        batch=8, query_length=1, key_length=160, heads=8, kv_heads=2, head_dim=64, empty_slots=(16,)
    ),
    "nano_long_context": _square(32_768, batch=1, heads=4, kv_heads=2, head_dim=32),
    "scout_train_chunked": _square(16_384, batch=1, heads=40, kv_heads=8, head_dim=128, chunk_size=8192),
    "scout_train_global": _square(16_384, batch=1, heads=40, kv_heads=8, head_dim=128),
    "scout_decode_global": Workload(
        batch=8, query_length=1, key_length=131_072, heads=40, kv_heads=8, head_dim=128, empty_slots=(0, 65_536)
    ),
}
"""Calls of the presets, at the lengths they are used at."""
