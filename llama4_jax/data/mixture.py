"""Streams of running text, and a mixture of them in exact proportions of tokens.

Libraries mix by elements; documents here differ a thousandfold in length, so shares are kept in tokens instead: each
piece comes from the stream that is furthest behind its share. After any piece no stream is further from its share than
the longest piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama4_jax.data.documents import Document
from llama4_jax.data.draws import shuffled
from llama4_jax.data.text import Source
from llama4_jax.tokenizer import Tokenizer


class TextStream:
    """Documents, shuffled anew each epoch, handed out in pieces that lose and repeat no token.

    Within a document the next piece starts at the token that was the last one's final target.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, *, seed: int, weight: float = 1.0):
        """weight: of the loss at each token."""
        self._sources, self._tokenizer, self._seed, self._weight = sources, tokenizer, seed, weight
        self._document = self._offset = 0
        self._tokens = np.zeros(0, np.int32)  # of document self._document - 1

    def take(self, room: int) -> Document:
        """The next piece: `room` positions, or fewer at the end of a document."""
        last = self._document + len(self._sources)
        while self._offset >= len(self._tokens) - 1:
            if self._document > last:
                raise ValueError(f"all {len(self._sources)} documents are empty; give a source with text")
            self._tokens, self._offset = self._read(self._document), 0
            self._document += 1
        start, stop = self._offset, min(self._offset + room, len(self._tokens) - 1)
        self._offset = stop
        weights = np.full(stop - start, self._weight, np.float32)
        return Document(self._tokens[start:stop], self._tokens[start + 1 : stop + 1], weights)

    def get_state(self) -> dict[str, int]:
        return {"document": self._document, "offset": self._offset}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._document, self._offset = state["document"], state["offset"]
        self._tokens = self._read(self._document - 1) if self._document else np.zeros(0, np.int32)

    def _read(self, position: int) -> np.ndarray:
        _, item = shuffled(position, len(self._sources), self._seed)
        document = self._sources[item].read()
        tokens = self._tokenizer.encode(document, bos=True, eos=True) if document else []
        return np.array(tokens, np.int32)


class Mixture:
    """Text streams by name, taken from in proportion to their shares."""

    def __init__(self, streams: Mapping[str, TextStream], shares: Mapping[str, float]):
        """shares: one positive number a stream; only their proportions count."""
        if streams.keys() != shares.keys() or not shares or min(shares.values()) <= 0:
            raise ValueError(
                f"wanted a positive share for each of {sorted(streams)}, got {dict(shares)}; leave out unused streams"
            )
        self._streams = dict(streams)
        self._shares = {name: shares[name] / sum(shares.values()) for name in streams}
        self.served = dict.fromkeys(streams, 0)  # tokens handed out so far

    def take(self, room: int) -> Document:
        """The next piece, of at most `room` tokens."""
        total = sum(self.served.values())
        name = max(self._streams, key=lambda name: self._shares[name] * total - self.served[name])
        piece = self._streams[name].take(room)
        self.served[name] += len(piece)
        return piece

    def get_state(self) -> dict[str, Any]:
        return {name: {**stream.get_state(), "served": self.served[name]} for name, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for name, stream in self._streams.items():
            stream.set_state(state[name])
            self.served[name] = state[name]["served"]
