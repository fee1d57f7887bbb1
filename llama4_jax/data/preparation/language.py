"""Which languages a text is written in, by profiles of its trigrams of characters learned from real text at run time.

A naive Bayes classifier: a trigram of case-folded characters falls in one of 2^16 buckets, and a language is a
distribution over buckets, smoothed by a tenth of a count. Windows of 256 characters are judged one by one, so a page that
is half English says so. It knows the languages that it was shown and names the nearest of them for any other.

Source: Cavnar and Trenkle 1994 (n-gram profiles); Dunning 1994 (their likelihood).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llama4_jax.data.preparation.words import mix

BUCKETS = 1 << 16
WINDOW = 256  # characters judged together
SMOOTHING = 0.1  # counts added to every bucket
MIN_CHARACTERS = 8_000  # of a language, to learn it from


@dataclasses.dataclass(frozen=True, eq=False)
class Profiles:
    """One distribution over trigrams a language.

    names: of the languages. log_probability: float32 [buckets languages].
    """

    names: tuple[str, ...]
    log_probability: np.ndarray

    def shares(self, text: str) -> dict[str, float]:
        """The share of the text's windows in each language found in it; nothing for fewer than three characters."""
        buckets = _trigrams(text)
        if not len(buckets):
            return {}
        starts = np.arange(0, len(buckets), WINDOW)
        scores = np.add.reduceat(self.log_probability[buckets], starts, axis=0)  # [windows languages]
        sizes = np.diff(np.append(starts, len(buckets)))
        weight = np.bincount(scores.argmax(-1), sizes, minlength=len(self.names)) / len(buckets)
        return {self.names[i]: round(float(weight[i]), 4) for i in np.argsort(-weight, kind="stable") if weight[i]}

    def language(self, text: str) -> str | None:
        """The language of most of the text."""
        return next(iter(self.shares(text)), None)


def learn(texts: Mapping[str, Iterable[str]]) -> Profiles | None:
    """Profiles of the languages with MIN_CHARACTERS or more; None for fewer than two of them."""
    names, tables = [], []
    for name in sorted(texts):
        counts = np.zeros(BUCKETS)
        for text in texts[name]:
            counts += np.bincount(_trigrams(text), minlength=BUCKETS)
        if counts.sum() >= MIN_CHARACTERS:
            names.append(name)
            tables.append(np.log((counts + SMOOTHING) / (counts.sum() + SMOOTHING * BUCKETS)))
    return Profiles(tuple(names), np.stack(tables, -1).astype(np.float32)) if len(names) > 1 else None


def accuracy(profiles: Profiles, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The share of whole texts whose language is named, for each language that the profiles know and texts show."""
    return {
        name: float(np.mean([profiles.language(text) == name for text in texts[name]]))
        for name in profiles.names
        if texts.get(name)
    }


def _trigrams(text: str) -> np.ndarray:
    """The bucket of each run of three characters; spacing counts as one space."""
    folded = " ".join(text.casefold().split())
    codes = np.frombuffer(folded.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < 3:
        return np.zeros(0, np.int64)
    joined = codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:]
    return (mix(joined) >> np.uint64(48)).astype(np.int64)
