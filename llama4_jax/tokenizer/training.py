"""Trains a byte-level BPE vocabulary on given texts and saves it in tiktoken's format.

Source: the `tokenizers` library does the counting and merging; Sennrich et al. 2016 (BPE), Radford et al. 2019 (over
bytes).
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama4_jax.tokenizer import bpe, hf_file, special


def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> bpe.Tokenizer:
    """The tokenizer at `path`, trained on `texts` unless it is there already.

    vocab_size: ids in all, special tokens included. The same texts give the same file. Beside it, `path`.corpus keeps
    a digest of what it was trained on, so that a vocabulary of another corpus is never taken for this one.

    Raises ValueError when `path` holds a tokenizer of other texts or size, when `texts` are too poor for `vocab_size`,
    or when `vocab_size` has no room for the bytes and the special tokens.
    """
    path = pathlib.Path(path)
    texts = list(texts)
    digest = _digest(texts, vocab_size)
    record = path.with_name(path.name + ".corpus")
    if path.exists():
        if not record.exists() or record.read_text().strip() != digest:
            raise ValueError(
                f"{path} was trained on other texts or to another size than vocab_size={vocab_size}; "
                "open it with tokenizer.load, delete it, or choose another path"
            )
        return bpe.load(path)
    ranks = _merge(texts, base=vocab_size - len(special.USED))
    path.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(digest + "\n")
    bpe.save(ranks, path)
    return bpe.load(path)


def merges(texts: Iterable[str], most: int, *, min_count: int = 0) -> dict[bytes, int]:
    """Bytes of each token -> rank: the 256 bytes, then merges from the most frequent on, until there are `most` tokens.

    There are fewer where `texts` hold no further pair that occurs `min_count` times. The first n of the result are what
    `most=n` gives, so that one training serves every smaller size.
    """
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(bpe.SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=most,
        min_frequency=min_count,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    byte_of = hf_file.byte_alphabet()
    return {bytes(byte_of[letter] for letter in token): rank for token, rank in model.get_vocab().items()}


def _merge(texts: list[str], base: int) -> dict[bytes, int]:
    """`base` tokens of `merges`, or ValueError."""
    if base < 256 or base == special.LLAMA4_BASE:
        fewest = 256 + len(special.USED)
        raise ValueError(
            f"vocab_size={base + len(special.USED)} leaves {base} ordinary tokens; wanted vocab_size >= {fewest} "
            f"and other than {special.LLAMA4_BASE + len(special.USED)}, which would pass for the published vocabulary"
        )
    ranks = merges(texts, base)
    if len(ranks) < base:
        raise ValueError(
            f"the texts yield {len(ranks)} tokens, wanted {base}; "
            f"give more text or vocab_size <= {len(ranks) + len(special.USED)}"
        )
    return ranks


def _digest(texts: list[str], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{vocab_size}\n{bpe.SPLIT_PATTERN}\n".encode())
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
