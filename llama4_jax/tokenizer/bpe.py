"""Byte-level BPE over the o200k-type split, read from a tiktoken-format file.

The file has one line a token: the token's bytes in base64, a space, its rank. Ranks run from 0 without gaps and
are the ids of ordinary text; special tokens follow them (see `special`). A vocabulary that was expanded later (see
`expand`) has its new tokens behind the special ones, so that no id changes: its ranks leave out the special ids.

Source: tiktoken (the algorithm and the file format); the published Llama 4 tokenizer (the split pattern).
"""

from __future__ import annotations

import base64
import binascii
import os
import pathlib
import re
import types
from collections.abc import Iterable, Mapping

import tiktoken

from llama4_jax.tokenizer import hf_file, slices, special

# Words are cut at a change from lower to upper case and keep English contractions; digits go by threes.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_SPECIAL = re.compile(r"<\|(\w+)\|>")


class Tokenizer:
    """Encodes text to ids and back.

    Ids 0 .. base-1 are ordinary; `special[name]`, by bare name such as "eot", are the next ones; ordinary tokens that
    were added later follow, to vocab_size-1. `ranks`: bytes of each ordinary token -> its id.
    Text never becomes a special id unless `allow_special` asks for it.
    """

    def __init__(self, ranks: Mapping[bytes, int]):
        """`ranks`: bytes of a token -> rank, without gaps but for the special ids, among them all 256 single bytes."""
        base = _base(ranks)
        self.ranks: Mapping[bytes, int] = types.MappingProxyType(dict(ranks))
        self.special: dict[str, int] = {name: base + offset for offset, name in enumerate(special.names(base))}
        self._encoding = tiktoken.Encoding(
            name=f"llama4-{len(ranks)}",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=dict(ranks),
            special_tokens={special.spelling(name): token for name, token in self.special.items()},
        )
        self.vocab_size = len(ranks) + len(self.special)
        self.bos = self.special["begin_of_text"]
        self.eos = self.special["end_of_text"]
        self.pad = self.special["finetune_right_pad"]
        self.stop = (self.eos, self.special["eom"], self.special["eot"])

    def encode(self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of `text`, optionally between begin_of_text and end_of_text.

        allow_special: `<|eot|>` and its like in `text` become their ids; otherwise they are plain text.

        Long texts are encoded in parts, with the ids of the whole; only within one word, row of signs or stretch of
        space of more than 100,000 characters, which tiktoken may fail on, ids may differ (see `slices`).
        """
        tokens = self._encode_special(text) if allow_special else self._encode_ordinary(text)
        return [self.bos] * bos + tokens + [self.eos] * eos

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; special tokens appear as `<|name|>`, bytes that are not UTF-8 as U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        tokens = [int(token) for token in tokens]
        outside = [token for token in tokens if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"token {outside[0]} is outside the vocabulary of {self.vocab_size}; "
                "decode with the tokenizer that the model was trained with"
            )
        return self._encoding.decode(tokens, errors="replace")

    def pieces(self, text: str) -> list[bytes]:
        """The bytes of each token of `text`, which joined are the text's."""
        return self._encoding.decode_tokens_bytes(self.encode(text))

    def parts(self, word: bytes) -> list[int]:
        """Ids of `word` taken as one word: merged, never split, and in need of no valid UTF-8."""
        return self._encoding._encode_single_piece(word)

    def _encode_ordinary(self, text: str) -> list[int]:
        if len(text) <= slices.WINDOW:
            return self._encoding.encode_ordinary(text)
        tokens: list[int] = []
        for part in slices.parts(text):
            tokens += self._encoding.encode_ordinary(part)
        return tokens

    def _encode_special(self, text: str) -> list[int]:
        """Special spellings are taken out first: no part may end within one."""
        tokens: list[int] = []
        start = 0
        for found in _SPECIAL.finditer(text):
            if found[1] in self.special:
                tokens += self._encode_ordinary(text[start : found.start()])
                tokens.append(self.special[found[1]])
                start = found.end()
        return tokens + self._encode_ordinary(text[start:])

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special={len(self.special)})"


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a tiktoken-format file, expanded or not, or in a `tokenizer.json` that says the same.

    Raises ValueError, naming file and line, for anything but base64 bytes and gapless ranks, and NotImplementedError for
    a `tokenizer.json` of another kind (see `hf_file`).
    """
    return Tokenizer(read(path))


def read(path: str | os.PathLike) -> dict[bytes, int]:
    """Bytes of each token in a file that `load` takes -> rank; as strict."""
    if pathlib.Path(path).suffix == ".json":
        ranks = hf_file.read(path, SPLIT_PATTERN)
        _check(ranks, path)
        return ranks
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: wanted base64 bytes, a space and a rank, got {line[:60]!r}; "
                "is this a tiktoken-format file?"
            ) from error
    _check(ranks, path)
    return ranks


def save(ranks: Mapping[bytes, int], path: str | os.PathLike) -> None:
    """Writes `ranks` in tiktoken's format. A reader sees the old file or the whole new one, never a part."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    lines = (
        b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    temporary.write_bytes(b"".join(lines))
    os.replace(temporary, path)


def _base(ranks: Mapping[bytes, int]) -> int:
    """How many ordinary tokens stand before the special ones: the ranks from 0 to the first gap."""
    taken = set(ranks.values())
    return next(rank for rank in range(len(ranks) + 1) if rank not in taken)


def _check(ranks: Mapping[bytes, int], path) -> None:
    base = _base(ranks)
    behind = base + len(special.names(base))
    if sorted(ranks.values()) != [*range(base), *range(behind, behind + len(ranks) - base)]:
        raise ValueError(
            f"{path}: ranks must run from 0 to {len(ranks) - 1}, each once and each for other bytes, or leave out "
            f"the special ids behind the first {base}, {base} to {behind - 1}; "
            "the file is damaged or was cut: fetch or train it again"
        )
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of the 256 single bytes have no rank, first {absent[0]:#04x}")
