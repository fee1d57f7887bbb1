"""All that can be said of documents one by one: their records, and the numbers by which they are kept or not.

This is the work of a preparation's workers. It loads tensorflow-text, so nothing imports it but a worker at work.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llama4_jax.data.preparation import corpus, dedup, normalise, quality, scripts, words
from llama4_jax.data.preparation.decontaminate import Forbidden
from llama4_jax.data.preparation.language import Profiles
from llama4_jax.data.preparation.settings import Settings


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of documents, annotated.

    records: of the good ones, as JSON. arrays: one row a document, good or not; see `Annotator.part`.
    seconds: of processor time, by stage.
    """

    records: list[bytes]
    arrays: dict[str, np.ndarray]
    seconds: dict[str, float]


class Annotator:
    """Annotates documents; what it needs for that is the same for all of them."""

    def __init__(
        self,
        settings: Settings,
        licences: Mapping[str, str],
        forbidden: Forbidden,
        profiles: Profiles | None,
    ):
        """licences: of each source. profiles: None where there was no text to learn languages from."""
        self._settings, self._licences, self._forbidden, self._profiles = settings, licences, forbidden, profiles
        self._seconds: collections.Counter = collections.Counter()

    def part(self, items: Sequence[corpus.Item]) -> Part:
        """Reads and annotates `items`.

        The arrays, n rows: reason int8, an index into quality.REASONS or -1; record int32, the row among the records or
        -1; source_bytes, text_bytes, repaired int64; digests, contents uint8 [n 16], of the text but for spacing and of
        the source; signatures uint32 [n hashes]; scripts [n scripts] and languages [n languages] float32, characters.
        hits int64 [hits 3]: (row, length, place) of each forbidden n-gram.
        """
        self._seconds.clear()
        with self._stage("read"):
            contents = [corpus.read(item) for item in items]
        with self._stage("repair and NFC"):
            normal = normalise.normalise(contents)
            texts = [document.text.decode("utf-8") for document in normal]
        encoded = [document.text for document in normal]
        with self._stage("scripts and word shapes"):
            makeups = normalise.makeup(encoded)
        with self._stage("sentences"):
            spans = normalise.sentences(encoded) if self._settings.sentences else [None] * len(items)
        with self._stage("quality"):
            ratios = [self._ratios(*row) for row in zip(texts, contents, normal, makeups)]
        reasons = [self._settings.rule.reason(row) for row in ratios]
        with self._stage("languages"):
            languages = [self._profiles.shares(text) if self._profiles else {} for text in texts]
        rows = zip(items, normal, makeups, spans, ratios, languages)
        with self._stage("records"):
            records = [self._record(*row) for row, reason in zip(rows, reasons) if reason is None]
        good = np.array([reason is None for reason in reasons], bool)
        arrays = {
            "reason": np.array(
                [-1 if reason is None else quality.REASONS.index(reason) for reason in reasons], np.int8
            ),
            "record": np.where(good, np.cumsum(good) - 1, -1).astype(np.int32),
            "source_bytes": np.array([len(content) for content in contents], np.int64),
            "text_bytes": np.array([len(text) for text in encoded], np.int64),
            "repaired": np.array([document.repaired for document in normal], np.int64),
            "contents": _rows([hashlib.blake2b(content, digest_size=16).digest() for content in contents]),
            "scripts": _table([makeup.scripts for makeup in makeups], scripts.NAMES),
            "languages": self._language_table(texts, languages),
            **self._fingerprints(texts),
        }
        return Part(records, arrays, dict(self._seconds))

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self._seconds[name] += time.process_time() - start

    def _ratios(self, text: str, content: bytes, normal: normalise.Normal, makeup: normalise.Makeup):
        repaired = normal.repaired / max(len(content), 1)
        return quality.ratios(text, words=makeup.words, shapes=makeup.shapes, repaired=repaired)

    def _record(self, item, normal, makeup, spans, ratios, languages) -> bytes:
        """One line of a shard; positions are in bytes, of the text, and `offsets` lead from there to the source."""
        lettered = max(sum(makeup.scripts.values()), 1)
        record = {
            "source": item.source,
            "name": item.name,
            "licence": self._licences[item.source],
            "text": normal.text.decode("utf-8"),
            "repaired": normal.repaired,
            "offsets": normal.offsets.as_list(),
            "scripts": {name: round(size / lettered, 4) for name, size in makeup.scripts.items()},
            "languages": languages,
            "ratios": ratios,
        }
        if spans is not None:
            record["sentences"] = spans.tolist()
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()

    def _fingerprints(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        likeness = self._settings.likeness
        with self._stage("word hashes"):
            hashes = [words.hashes(text) for text in texts]
        with self._stage("duplicates: signatures"):
            digests = [dedup.digest(text) for text in texts]
            sets = [words.shingles(row, likeness.shingle_words) for row in hashes]
            signatures = [dedup.signature(row, likeness) for row in sets]
        with self._stage("leaks: n-grams"):
            hits = [self._forbidden.hits(row) for row in hashes]
        numbered = [np.insert(rows, 0, number, axis=1) for number, rows in enumerate(hits)]
        return {
            "digests": _rows(digests),
            "signatures": np.stack(signatures),
            "hits": np.concatenate([np.zeros((0, 3), np.int64), *numbered]),
        }

    def _language_table(self, texts, languages) -> np.ndarray:
        names = self._profiles.names if self._profiles else ()
        sized = [{name: share * len(text) for name, share in row.items()} for text, row in zip(texts, languages)]
        return _table(sized, names)


def _rows(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)


def _table(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    return np.array([[row.get(name, 0) for name in names] for row in rows], np.float32).reshape(len(rows), len(names))
