"""The endless stream of training batches: deterministic, and resumable after any batch from a small JSON state.

    batches = loader.make(config, tokenizer)
    batch = next(batches)                 # dict of numpy arrays, see `make`
    state = batches.get_state()           # of the batches handed out, whatever was prepared ahead
    batches.set_state(state)              # also in another process: the same batches follow

The iterator is grain's, so grain's Orbax handlers can save it too. Making a batch costs a few per cent of a training step,
all of it under one interpreter lock: worker processes would cost more to start than they could save. One thread can work
ahead, which gains nothing where XLA computes on the same cores, and takes loading off the clock beside an accelerator.

In a run of several processes each makes all rows of every batch, from which its devices take theirs: rows depend on all the
documents packed before them, and cost little. Pictures, which cost most, are drawn only where they are looked at (`drawn`).
So neither the batches nor the state depend on how many processes there are.

Let go of the iterator before the interpreter exits (keep it out of module globals): grain's clean-up complains otherwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from llama4_jax.config.data import DataConfig
from llama4_jax.data import documents, packing, text
from llama4_jax.data.draws import Draw
from llama4_jax.data.mixture import Mixture, TextStream
from llama4_jax.data.pictures import Pictures, written_names
from llama4_jax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def make(
    config: DataConfig, tokenizer: Tokenizer, split: str = "train", *, drawn: range | None = None
) -> grain.DatasetIterator[Batch]:
    """An iterator over batches, endless, with `get_state()`, `set_state(state)` and `close()`.

    split: "train", or "heldout": text and renderings that "train" never shows.
    drawn: which pictures of a batch, by their place in `images`, to draw; the others stay zeros. All by default.

    A batch has tokens, targets, positions, segments int32 [b t], loss_weights float32 [b t] (see `packing.arrays`), and,
    if images_per_batch = n > 0, images float32 [n h w c] in [-1, 1], in order of appearance over the flattened batch,
    with tiles of zeros at the end for pictures that found no room.

    Raises ValueError when the pictures cannot fit in a batch.
    """
    dataset: grain.IterDataset[Batch] = _Batches(config, tokenizer, split, drawn)
    # grain takes a buffer of 0 for an unbounded one when it restores, and then two threads pull at the same batches.
    if config.prefetch:
        dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=config.prefetch)
    return iter(dataset)


def fill_ratio(batch: Batch) -> dict[str, float]:
    """Shares of a batch in use: of its `positions`, and of its `images` if there are any."""
    ratio = {"positions": float(np.mean(batch["segments"] > 0))}
    if "images" in batch:
        # Surplus tiles are exactly zero; a rendering never is.
        ratio["images"] = float(np.mean(np.any(batch["images"] != 0, axis=(1, 2, 3))))
    return ratio


def tokenizer_texts(config: DataConfig, text_bytes: int = 1_000_000) -> Iterator[str]:
    """What to train a tokenizer on: about `text_bytes` of running text, and twice as much of names.

    Names, written as documents write them, recur until they weigh that much: they are few, but what the model is asked
    for, and should come out as few tokens.
    """
    if config.images_per_batch:
        names = "".join(written_names(config))
        yield from [names] * (1 + 2 * text_bytes // len(names.encode()))
    for kind in text.KINDS:
        room = text_bytes // len(text.KINDS)
        for source in text.sources(kind, "train"):
            if room <= 0:
                break
            document = source.read()
            room -= len(document.encode())
            yield document


class _Batches(grain.IterDataset[Batch]):
    def __init__(self, config: DataConfig, tokenizer: Tokenizer, split: str, drawn: range | None):
        super().__init__()
        self._arguments = (config, tokenizer, split, drawn)

    def __iter__(self) -> _BatchIterator:
        return _BatchIterator(*self._arguments)


class _BatchIterator(grain.DatasetIterator[Batch]):
    """State: the next picture, those that found no room so far, and where each text stream is."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, split: str, drawn: range | None):
        super().__init__()
        self._config, self._tokenizer = config, tokenizer
        self._drawn = range(config.images_per_batch) if drawn is None else drawn
        rendering = Draw.TRAIN_RENDERING if split == "train" else Draw.HELDOUT_RENDERING
        self._pictures = Pictures(config, tokenizer, rendering) if config.images_per_batch else None
        shares = {"code": config.code_share, "documentation": 1 - config.code_share}
        shares = {kind: share for kind, share in shares.items() if share > 0}
        sources = {kind: text.sources(kind, split) for kind in shares}
        streams = {
            kind: TextStream(sources[kind], tokenizer, seed=config.seed, weight=config.text_weight) for kind in shares
        }
        self._text = Mixture(streams, shares)
        self._next_picture = 0
        self._waiting: list[int] = []
        names = [source.name for kind in shares for source in sources[kind]]
        names += [entry.character for entry in self._pictures.emoji] if self._pictures else []
        self._fingerprint = _fingerprint(config, tokenizer, split, names)
        if self._pictures:
            self._check_capacity()

    def __next__(self) -> Batch:
        config = self._config
        rows, waiting = packing.fit(self._picture_documents(), config.rows, config.sequence_length)
        self._waiting = sorted(document.picture for document in waiting)
        packing.fill(rows, config.sequence_length, self._text.take, config.min_text)
        batch = packing.arrays(rows, config.sequence_length)
        if self._pictures:
            batch["images"] = self._images(packing.pictures(rows), batch["tokens"])
        return batch

    def get_state(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "next_picture": self._next_picture,
            "waiting": list(self._waiting),
            "text": self._text.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of another configuration, tokenizer or corpus."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the saved data state has fingerprint {state['fingerprint']}, this loader {self._fingerprint}: the "
                "configuration, tokenizer, emoji packages or Python's library changed; resume with the old ones, or "
                "start the data afresh"
            )
        self._next_picture, self._waiting = state["next_picture"], list(state["waiting"])
        self._text.set_state(state["text"])

    def _picture_documents(self) -> list[documents.Document]:
        """As many as a batch has pictures; those that found no room in the last batch come first."""
        if not self._pictures:
            return []
        fresh = self._config.images_per_batch - len(self._waiting)
        positions = [*self._waiting, *range(self._next_picture, self._next_picture + fresh)]
        self._next_picture += fresh
        return [self._pictures.document(position) for position in positions]

    def _images(self, pictures: list[int], tokens: np.ndarray) -> np.ndarray:
        config = self._config
        documents.check_images(tokens, len(pictures), self._tokenizer.special["patch"], config.tokens_per_tile)
        images = np.zeros((config.images_per_batch, config.image_size, config.image_size, 3), np.float32)
        for place, picture in enumerate(pictures):
            if place in self._drawn:
                images[place] = self._pictures.image(picture)
        return images

    def _check_capacity(self) -> None:
        config = self._config
        first = [self._pictures.document(position) for position in range(config.images_per_batch)]
        _, left = packing.fit(first, config.rows, config.sequence_length)
        if len(left) > config.images_per_batch // 20:
            raise ValueError(
                f"images_per_batch={config.images_per_batch} documents of about {np.mean([*map(len, first)]):.0f} "
                f"positions do not fit rows={config.rows} of sequence_length={config.sequence_length}; use "
                f"images_per_batch <= {config.images_per_batch - len(left)}, or more or longer rows"
            )
        share = sum(map(len, first)) / (config.rows * config.sequence_length)
        logging.getLogger(__name__).info("pictures fill about %.0f %% of each batch, text the rest", 100 * share)


def _fingerprint(config: DataConfig, tokenizer: Tokenizer, split: str, names: list[str]) -> str:
    """Equal for loaders that make the same batches; how far they work ahead does not matter."""
    settled = dataclasses.replace(config, prefetch=0)
    parts = [repr(settled), str(tokenizer.vocab_size), split, *names]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
