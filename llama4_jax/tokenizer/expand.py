"""Adds tokens to a tokenizer: new merges on top of the old ones, so that every old id keeps its meaning.

The new tokens take the ids behind the special tokens, in the order in which they were learnt, and these ids are their
ranks. tiktoken's merging asks for the lowest rank first, so a text is first merged as before, to the end, and new merges
then only join what it was cut into: the old tokens of any text are the new ones, some of them cut further. Learning
follows tiktoken: two neighbours merge whenever their joined bytes are a token, whichever pair it was learnt from.

Source: Sennrich et al. 2016 (BPE), carried on from the state in which an existing vocabulary leaves its words.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import os
from collections.abc import Iterable, Sequence

import regex
from tqdm import tqdm

from llama4_jax.tokenizer import bpe

_SPLIT = regex.compile(bpe.SPLIT_PATTERN)


def expand(
    tok: bpe.Tokenizer, texts: Iterable[str], num_new: int, path: str | os.PathLike, *, min_count: int = 2
) -> bpe.Tokenizer:
    """`tok` with `num_new` more tokens, those that shorten `texts` most, saved at `path` in tiktoken's format.

    min_count: how often a pair of neighbours must occur in `texts` to become a token. The same texts give the same
    file. Raises ValueError when the texts hold too few such pairs; nothing is written then.
    """
    if num_new < 1:
        raise ValueError(f"num_new={num_new}; wanted at least 1 token to add")
    words = _Words(tok, texts)
    ranks = dict(tok.ranks)
    for added in tqdm(range(num_new), unit="token", desc="learning merges", mininterval=0.5):
        token = words.most_frequent(min_count)
        if token is None:
            raise ValueError(
                f"the texts yield {added} new tokens that occur {min_count} times, wanted {num_new}; "
                f"give more text, or num_new <= {added}"
            )
        ranks[token] = tok.vocab_size + added
        words.merge(token, ranks)
    bpe.save(ranks, path)
    return bpe.load(path)


def parts(old: bpe.Tokenizer, new: bpe.Tokenizer) -> list[list[int]]:
    """For each id that `new` has more than `old`, in order: the old ids of its bytes.

    Raises ValueError unless `new` is an expansion of `old`.
    """
    added = sorted(new.ranks.items() - old.ranks.items(), key=lambda item: item[1])
    kept = old.ranks.items() <= new.ranks.items()
    if not kept or [rank for _, rank in added] != list(range(old.vocab_size, new.vocab_size)):
        raise ValueError(
            f"a tokenizer of {new.vocab_size} ids is no expansion of this one of {old.vocab_size}: old ids changed or "
            "are gone; expand the tokenizer that the model was trained with"
        )
    return [old.parts(token) for token, _ in added]


class _Words:
    """The distinct words of a corpus, each cut into tokens, and how often each two neighbours meet.

    Invariants: `_count[t]` is the number of places, over the whole corpus, where two neighbours join to the bytes t;
    `_where[t]` are the words that have such a place (and perhaps some that no longer do); `_heap` holds (-count, t) for
    every current count, beside counts that are out of date.
    """

    def __init__(self, tok: bpe.Tokenizer, texts: Iterable[str]):
        times = collections.Counter(word for text in texts for word in _SPLIT.findall(text))
        bytes_of = {rank: token for token, rank in tok.ranks.items()}
        self._times = list(times.values())
        self._tokens = [[bytes_of[i] for i in tok.parts(word.encode())] for word in times]
        self._count: collections.Counter[bytes] = collections.Counter()
        self._where: dict[bytes, set[int]] = collections.defaultdict(set)
        for word in range(len(self._tokens)):
            self._add(word, +1)
        self._heap = [(-count, token) for token, count in self._count.items()]
        heapq.heapify(self._heap)

    def most_frequent(self, min_count: int) -> bytes | None:
        """The pair of neighbours that meet most often, joined; the first in byte order among equals."""
        while self._heap and -self._heap[0][0] >= min_count:
            count, token = heapq.heappop(self._heap)
            if self._count.get(token) == -count:
                return token
        return None

    def merge(self, token: bytes, ranks: dict[bytes, int]) -> None:
        """Cuts every word as `ranks`, which now have `token`, cut it."""
        changed: set[bytes] = set()
        for word in self._where.pop(token):
            changed |= self._add(word, -1)
            self._tokens[word] = _settle(self._tokens[word], ranks)
            changed |= self._add(word, +1)
        for pair in changed:
            if self._count[pair]:
                heapq.heappush(self._heap, (-self._count[pair], pair))
            else:
                del self._count[pair]

    def _add(self, word: int, sign: int) -> set[bytes]:
        """Counts the pairs of one word in (+1) or out (-1); returns them."""
        pairs = _pairs(self._tokens[word])
        for pair in pairs:
            self._count[pair] += sign * self._times[word]
            if sign > 0:
                self._where[pair].add(word)
        return set(pairs)


def _pairs(tokens: Sequence[bytes]) -> list[bytes]:
    return [left + right for left, right in itertools.pairwise(tokens)]


def _settle(tokens: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Merges neighbours, the lowest rank first and the leftmost among equals, until no two join to a token."""
    while True:
        found = [(ranks[pair], place) for place, pair in enumerate(_pairs(tokens)) if pair in ranks]
        if not found:
            return tokens
        _, place = min(found)
        tokens = [*tokens[:place], tokens[place] + tokens[place + 1], *tokens[place + 2 :]]
