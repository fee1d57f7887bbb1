"""Words of a text and their n-grams as 64-bit hashes, by numpy: what duplicates and leaks are recognised by.

A word is a run of letters, digits and combining marks, case folded; punctuation and spacing do not count. Scripts that
write no spaces (Han, kana, Thai, Khmer, Lao, Burmese) have one word a character.

A word of bytes c_0 c_1 ... hashes to mix(sum_i (c_i + 1) P^i mod 2^64), so that all words of a text come from one
cumulative sum: P is odd and has an inverse. Two different n-grams among n collide with probability about n^2 / 2^65.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

_SEPARATOR, _LETTER, _ALONE = range(3)
_UNSPACED = (  # first and last code points of scripts without spaces
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF)),
    *((0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
)
_CHARACTER_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORD_BASE = np.uint64(0xD1342543DE82EF95)
_MASK = (1 << 64) - 1


def hashes(text: str) -> np.ndarray:
    """One hash for each word of `text`, in order: uint64 [words]."""
    codes = _codes(text.casefold())
    starts, ends = _spans(codes)
    powers, inverses = _powers(1 << len(codes).bit_length())
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((codes + np.uint64(1)) * powers[: len(codes)])])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


def split(text: str) -> list[str]:
    """The words that `hashes` hashes, themselves: slower, for showing and checking."""
    folded = text.casefold()
    return [folded[start:end] for start, end in zip(*map(np.ndarray.tolist, _spans(_codes(folded))))]


def ngrams(words: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of `length` words: uint64 [max(words - length + 1, 0)]."""
    count = max(len(words) - length + 1, 0)
    total = np.zeros(count, np.uint64)
    for place in range(length):
        total = total * _WORD_BASE + words[place : place + count]
    return mix(total)


def shingles(words: np.ndarray, length: int) -> np.ndarray:
    """The set of n-grams, sorted; a text of fewer than `length` words is one n-gram."""
    return np.unique(ngrams(words, min(length, max(len(words), 1))))


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads every bit over the word. Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _codes(text: str) -> np.ndarray:
    """Code points: uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _spans(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and end: int64 [words] each."""
    kinds = _kinds()[codes]
    inside, alone = kinds == _LETTER, kinds == _ALONE
    apart = np.zeros(1, bool)
    starts = alone | (inside & ~np.concatenate([apart, inside[:-1]]))
    ends = alone | (inside & ~np.concatenate([inside[1:], apart]))
    return np.flatnonzero(starts[: len(codes)]), np.flatnonzero(ends[: len(codes)]) + 1


@functools.cache
def _kinds() -> np.ndarray:
    """What each code point is to a word: uint8 [0x110000]."""
    kinds = np.zeros(0x110000, np.uint8)
    for code in range(0x110000):
        character = chr(code)
        if character.isalnum() or unicodedata.category(character)[0] == "M":
            kinds[code] = _LETTER
    for first, last in _UNSPACED:
        block = kinds[first : last + 1]
        block[block == _LETTER] = _ALONE
    return kinds


@functools.lru_cache(maxsize=4)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """P^0 ... P^(length - 1) and their inverses modulo 2^64."""
    inverse = np.uint64(pow(int(_CHARACTER_BASE), -1, _MASK + 1))
    return tuple(
        np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(length - 1, base, np.uint64))])
        for base in (_CHARACTER_BASE, inverse)
    )
