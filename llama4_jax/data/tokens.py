"""Prepared text as token ids, written once for each tokenizer, so that a training run can read any row of it at once.

    FOLDER/tokens-TOKENIZER/SHARD.lengths.npy    tokens of each document of a shard of text, int64
    FOLDER/tokens-TOKENIZER/SHARD.tokens         their ids one after another, int32, little-endian

TOKENIZER and SHARD are hashes of what the tokens were made with and from, so a file that is there is the right one, whole.
A document is <|begin_of_text|>, its text, <|end_of_text|>: n tokens are n - 1 positions, for the last is a target only.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable
from concurrent import futures

import numpy as np
from tqdm import tqdm

from llama4_jax.data.preparation import read
from llama4_jax.tokenizer import Tokenizer

DTYPE = np.dtype("<i4")


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give every text the same ids."""
    digest = hashlib.sha256()
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()[:12]


def write(folder: str | pathlib.Path, tokenizer: Tokenizer, *, index: int = 0, count: int = 1) -> None:
    """Tokenises the shards of a preparation that have not been yet.

    index, count: this process takes each `count`-th shard, from the one numbered `index`; the others take the rest.
    Killed, it goes on where it was. Raises ValueError for a damaged shard and for a folder without a manifest.
    """
    place = _place(folder, tokenizer)
    missing = [shard for shard in read.manifest(folder)["shards"][index::count] if not _files(place, shard)[1].exists()]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for shard in tqdm(missing, unit="shard", desc="tokenise", disable=not missing):
            read.check(folder, shard)

            def encode(row: int, path=place.parent / shard["file"]) -> np.ndarray:
                return np.array(tokenizer.encode(read.record(path, row)["text"], bos=True, eos=True), DTYPE)

            # In threads: tiktoken lets others run while it works.
            _write_shard(pool.map(encode, range(shard["documents"])), *_files(place, shard))


def _write_shard(documents: Iterable[np.ndarray], lengths_file: pathlib.Path, tokens_file: pathlib.Path) -> None:
    tokens_file.parent.mkdir(exist_ok=True)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}") for path in (lengths_file, tokens_file)]
    lengths = []
    with temporary[1].open("wb") as file:
        for tokens in documents:
            lengths.append(len(tokens))
            file.write(tokens.tobytes())
    with temporary[0].open("wb") as file:
        np.save(file, np.array(lengths, np.int64))
    for path, final in zip(temporary, (lengths_file, tokens_file)):  # tokens last: they say that both are there
        path.replace(final)


def _place(folder: str | pathlib.Path, tokenizer: Tokenizer) -> pathlib.Path:
    return pathlib.Path(folder) / f"tokens-{fingerprint(tokenizer)}"


def _files(place: pathlib.Path, shard: dict) -> tuple[pathlib.Path, pathlib.Path]:
    return place / f"{shard['sha256'][:16]}.lengths.npy", place / f"{shard['sha256'][:16]}.tokens"


class Tokens:
    """The documents of a folder, one after another, in parts read when asked for.

    bounds: int64 [documents + 1], the positions before each document, and all of them at the end: eight bytes a document is
    what is held in memory.
    """

    def __init__(self, folder: str | pathlib.Path, tokenizer: Tokenizer):
        """Raises ValueError for shards that are not tokenised."""
        place = _place(folder, tokenizer)
        pairs = [_files(place, shard) for shard in read.manifest(folder)["shards"]]
        missing = [tokens.name for _, tokens in pairs if not tokens.exists()]
        if missing or not pairs:
            raise ValueError(
                f"{folder}: {len(missing)} of {len(pairs)} shards of text are not tokenised with {tokenizer}; call tokens.write"
            )
        lengths = [np.load(lengths) for lengths, _ in pairs]
        self._files = [tokens for _, tokens in pairs]
        self._first = np.cumsum([0, *map(len, lengths)])  # documents before each shard
        self.bounds = np.cumsum(np.concatenate([[0], *lengths]) - 1) + 1

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a document, int32."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        # Each document before this one in the shard has one token more than it has positions.
        first = self._first[shard]
        before = self.bounds[document] - self.bounds[first] + document - first
        return np.fromfile(self._files[shard], DTYPE, stop - start, offset=DTYPE.itemsize * int(before + start))
