"""How densely a tokenizer writes a text: tokens for a word, bytes for a token, and how many words stay whole.

A word is a run of letters, marks, digits and underscores, with an apostrophe inside ("isn't", "read_file", "3rd"). Han,
kana, Thai, Lao, Khmer and Burmese are written without spaces between words; splitting them into words takes a
dictionary, so there each character, with the marks on it, counts as a word, and their "tokens per word" are tokens per
character: comparable between tokenizers, not with other languages. Signs and space belong to no word, but their tokens
are counted: tokens per word are all tokens of a text over its words, which is high where signs are many, as in code.

Source: fertility and the share of continued words as in Rust et al. 2021, "How good is your tokenizer?", section 3.1,
with a word defined by characters instead of by treebanks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import regex

_UNSPACED = r"\u30fc\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]"
_WORD = regex.compile(rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|{_LETTER}+(?:['\u2019]{_LETTER}+)*", regex.VERSION1)

Pieces = Callable[[str], list[bytes]]  # a text -> the bytes of each of its tokens, which joined are the text's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fertility:
    """Counts over some texts, and their ratios (nan where there is nothing to divide by)."""

    bytes: int  # UTF-8
    words: int
    tokens: int
    unbroken: int  # words without a border of tokens inside

    @property
    def tokens_per_word(self) -> float:
        return _ratio(self.tokens, self.words)

    @property
    def bytes_per_token(self) -> float:
        return _ratio(self.bytes, self.tokens)

    @property
    def unbroken_share(self) -> float:
        """A word counts as unbroken in the company of a space or sign before it, or of more words, in one token."""
        return _ratio(self.unbroken, self.words)


def measure(pieces: Pieces, texts: Iterable[str]) -> Fertility:
    """Counts of `texts` as `pieces`, for example `Tokenizer.pieces`, cuts them.

    Raises ValueError when the pieces are not the text's bytes, for then no border means anything.
    """
    total = Fertility(bytes=0, words=0, tokens=0, unbroken=0)
    for text in texts:
        cut = pieces(text)
        if b"".join(cut) != text.encode():
            raise ValueError(
                f"the tokens of {text[:40]!r} join to other bytes than the text's; "
                "measure a tokenizer that keeps every byte, without normalising or adding tokens"
            )
        spans = words(text)
        borders = sorted(itertools.accumulate(map(len, cut)))
        total = Fertility(
            bytes=total.bytes + len(text.encode()),
            words=total.words + len(spans),
            tokens=total.tokens + len(cut),
            unbroken=total.unbroken + _whole(spans, borders),
        )
    return total


def words(text: str) -> list[tuple[int, int]]:
    """The words of `text`, each from byte to byte of its UTF-8."""
    spans, characters, count = [], 0, 0
    for found in _WORD.finditer(text):
        count += len(text[characters : found.start()].encode())
        width = len(found[0].encode())
        spans.append((count, count + width))
        characters, count = found.end(), count + width
    return spans


def _whole(spans: list[tuple[int, int]], borders: list[int]) -> int:
    """How many spans have no border strictly inside; both in order."""
    inside = set(borders)
    return sum(not any(place in inside for place in range(start + 1, end)) for start, end in spans)


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else float("nan")
