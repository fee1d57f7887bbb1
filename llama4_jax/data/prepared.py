"""Batches of prepared text for training on pods: any row is read by itself, so a process makes only the rows it needs.

    tokens.write("runs/text", tokenizer)
    batches = prepared.make(PreparedConfig(folders=("runs/text",)), tokenizer, own=rows.own(256, 8192, mesh))

All documents of a folder, one after another as they were prepared (in an order drawn by seed), are cut every
`sequence_length` positions: pieces of documents as `mixture.TextStream` would hand them out, no token lost or repeated, but
for the end of the folder that fills no row. Rows are shuffled anew each epoch; folders take turns, each as often as its share
says: of whole rows, and so of tokens. All that is grain's.

So row r of batch n is a function of n * rows + r, whoever makes it: no row depends on what was packed before it, as it does in
`data.loader`, and nobody need make the rows of others. The state is the number of batches. Batches are therefore the same for
any number of processes, a run goes on at any batch on more or fewer of them, and what a process reads and packs does not grow
with the run: of a batch of 256 rows of 8,192 tokens, 8 rows take 10 ms of one core, all of them 55. The price is that text is
tokenised beforehand (see `data.tokens`): without lengths nobody knows where a row begins.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection
from typing import Any

import grain
import numpy as np

from llama4_jax.config.data import PreparedConfig
from llama4_jax.data import packing, tokens
from llama4_jax.data.documents import Document
from llama4_jax.data.draws import Draw, generator
from llama4_jax.data.loader import Batch
from llama4_jax.data.preparation import read
from llama4_jax.tokenizer import Tokenizer


def make(
    config: PreparedConfig, tokenizer: Tokenizer, *, own: Collection[int] | None = None
) -> grain.DatasetIterator[Batch]:
    """An iterator over batches, endless, with `get_state()`, `set_state(state)` and `close()`.

    own: which rows to make, all by default. Those of other processes are blank: one document of zeros without weight, which
    has as many positions, so that all count the same tokens.

    A batch has tokens, targets, positions, segments int32 [b t] and loss_weights float32 [b t]; see `packing.arrays`.
    Raises ValueError for a folder that is not prepared or not tokenised, or has not one row.
    """
    own = range(config.rows) if own is None else frozenset(own)
    return _Batches(config, _mixed(config, tokenizer), own, _fingerprint(config, tokenizer))


class Rows:
    """The rows of one folder, in order of the text."""

    def __init__(self, folder: str, tokenizer: Tokenizer, length: int):
        self._tokens, self._length = tokens.Tokens(folder, tokenizer), length
        if not len(self):
            raise ValueError(
                f"{folder} holds {self._tokens.bounds[-1]} positions, less than one row of sequence_length={length}; "
                "prepare more text, or use shorter rows"
            )

    def __len__(self) -> int:
        return int(self._tokens.bounds[-1]) // self._length

    def __getitem__(self, row: int) -> packing.Row:
        start, stop = row * self._length, (row + 1) * self._length
        bounds = self._tokens.bounds
        first, last = np.searchsorted(bounds, [start, stop - 1], side="right") - 1
        return [self._piece(document, start, stop) for document in range(first, last + 1)]

    def _piece(self, document: int, start: int, stop: int) -> Document:
        """What positions `start` to `stop` of the folder have of a document."""
        before, end = self._tokens.bounds[document : document + 2]
        low, high = max(start, before) - before, min(stop, end) - before
        ids = self._tokens.read(document, low, high + 1)
        return Document(ids[:-1], ids[1:], np.ones(high - low, np.float32))


class _Batches(grain.DatasetIterator[Batch]):
    """State: how many batches were handed out."""

    def __init__(
        self, config: PreparedConfig, rows: grain.MapDataset[packing.Row], own: Collection[int], fingerprint: str
    ):
        super().__init__()
        self._config, self._rows, self._own, self._fingerprint = config, rows, own, fingerprint
        nothing = np.zeros(config.sequence_length, np.int32)
        self._blank = [Document(nothing, nothing, nothing.astype(np.float32))]
        ahead = grain.ReadOptions(num_threads=min(config.prefetch, 1), prefetch_buffer_size=config.prefetch)
        self._batches = iter(grain.MapDataset.range(sys.maxsize).map(self._batch).to_iter_dataset(ahead))

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint, "batches": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other text or another tokenizer, order or shape of batches."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the saved data state has fingerprint {state['fingerprint']}, this loader {self._fingerprint}: the text, "
                "its shares, the tokenizer, the seed, rows or sequence_length changed; resume with the old ones, or start afresh"
            )
        self._batches.set_state(state["batches"])

    def close(self) -> None:
        self._batches.close()

    def _batch(self, number: int) -> Batch:
        first = number * self._config.rows
        rows = [self._rows[first + row] if row in self._own else self._blank for row in range(self._config.rows)]
        return packing.arrays(rows, self._config.sequence_length)


def _mixed(config: PreparedConfig, tokenizer: Tokenizer) -> grain.MapDataset[packing.Row]:
    """The endless sequence of rows. Shares are those of `config.weights` to a hundredth of the smallest."""
    folders = []
    for number, folder in enumerate(config.folders):
        seed = int(generator(config.seed, Draw.ORDER, number).integers(2**32))
        rows = Rows(folder, tokenizer, config.sequence_length)
        folders.append(grain.MapDataset.source(rows).shuffle(seed=seed).repeat())
    return grain.MapDataset.mix(folders, config.weights or (1.0,) * len(folders))


def _fingerprint(config: PreparedConfig, tokenizer: Tokenizer) -> str:
    """Equal for loaders that make the same batches, wherever their folders lie now."""
    shards = [[shard["sha256"] for shard in read.manifest(folder)["shards"]] for folder in config.folders]
    parts = (shards, config.weights, config.rows, config.sequence_length, config.seed, tokens.fingerprint(tokenizer))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
