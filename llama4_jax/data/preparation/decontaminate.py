"""Finds documents that give away evaluation sets: those that share a run of 13 words with one of their items.

Words are compared case folded and without punctuation. An item shorter than 13 words is looked for as a whole if it has 8
or more; shorter ones cannot be told from ordinary speech and are counted as unchecked. The whole document is removed, not
the run: what surrounds a leaked question is most often its answer.

An n-gram that more than ten documents share, duplicates apart, is a phrase of the trade (a licence, a usage line) and no
leak.

Source: GPT-3 (Brown et al. 2020, appendix C): n from 8 to 13, n-grams in more than ten documents ignored. It removes 200
characters around a match where we remove the document.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from llama4_jax.data.preparation import words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """What counts as a leak."""

    words: int = 13  # in a run that a document must not share with an evaluation item
    min_words: int = 8  # of an item that is looked for as a whole
    common_after: int = 10  # documents; an n-gram in more of them is no leak

    def __post_init__(self):
        if not 1 <= self.min_words <= self.words:
            raise ValueError(f"wanted 1 <= min_words <= words, got min_words={self.min_words}, words={self.words}")


@dataclasses.dataclass(frozen=True, eq=False)
class Forbidden:
    """The n-grams of evaluation items.

    grams: for each length, sorted hashes. items: for each hash, the number of the first item that has it.
    names: of the items. unchecked: how many were too short.
    """

    grams: Mapping[int, np.ndarray]
    items: Mapping[int, np.ndarray]
    names: tuple[str, ...]
    unchecked: int

    def hits(self, hashes: np.ndarray) -> np.ndarray:
        """The forbidden n-grams of a document of these words, each once: int64 [hits 2] of (length, place in grams)."""
        found = [np.zeros((0, 2), np.int64)]
        for length, grams in self.grams.items():
            own = np.unique(words.ngrams(hashes, length))
            places = np.searchsorted(grams, own)
            places = places[grams[np.minimum(places, len(grams) - 1)] == own]
            found.append(np.stack([np.full_like(places, length), places], -1))
        return np.concatenate(found)


def forbid(items: Mapping[str, str], overlap: Overlap) -> Forbidden:
    """Indexes evaluation items by name."""
    collected: dict[int, list[tuple[np.ndarray, int]]] = {}
    unchecked = 0
    for number, text in enumerate(items.values()):
        hashes = words.hashes(text)
        length = min(overlap.words, len(hashes))
        if length < overlap.min_words:
            unchecked += 1
        else:
            collected.setdefault(length, []).append((words.ngrams(hashes, length), number))
    grams, first = {}, {}
    for length, pieces in sorted(collected.items()):
        every = np.concatenate([hashes for hashes, _ in pieces])
        numbers = np.concatenate([np.full(len(hashes), number) for hashes, number in pieces])
        grams[length], places = np.unique(every, return_index=True)
        first[length] = numbers[places]
    return Forbidden(grams, first, tuple(items), unchecked)


def leaks(hits: Sequence[np.ndarray], forbidden: Forbidden, overlap: Overlap) -> tuple[np.ndarray, int]:
    """(The number of the first item that each document gives away, or -1: int64 [documents]; n-grams too common.)

    hits: of each document that is neither rejected nor a duplicate; a leak copied twenty times is still one.
    """
    counts = {length: np.zeros(len(grams), np.int64) for length, grams in forbidden.grams.items()}
    for rows in hits:
        for length, place in rows.tolist():
            counts[length][place] += 1
    given = [
        min(
            (forbidden.items[n][place] for n, place in rows.tolist() if counts[n][place] <= overlap.common_after),
            default=-1,
        )
        for rows in hits
    ]
    common = sum(int(np.sum(count > overlap.common_after)) for count in counts.values())
    return np.array(given, np.int64), common


def read_items(path: str | pathlib.Path, fields: Sequence[str] = ()) -> dict[str, str]:
    """The items of an evaluation set by name: a text file is one, each line of a .jsonl file is one.

    fields: of the JSON object, joined; all strings in it when none are named. Raises ValueError for a line without any.
    """
    path = pathlib.Path(path)
    if path.suffix != ".jsonl":
        return {path.name: path.read_text(encoding="utf-8", errors="replace")}
    items = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        wanted = fields or [key for key in record if isinstance(record[key], str)]
        strings = [record[key] for key in wanted if isinstance(record.get(key), str)]
        if not strings:
            raise ValueError(f"{path}:{number}: wanted text in {list(fields) or 'any field'}, got {sorted(record)}")
        items[f"{path.name}:{number}"] = "\n".join(strings)
    return items
