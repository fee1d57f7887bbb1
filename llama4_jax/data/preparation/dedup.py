"""Finds duplicates: equal texts by a hash, near ones by MinHash, bands and then their true Jaccard similarity.

Two documents are near duplicates if the sets of their word n-grams have a Jaccard similarity of `threshold` or more. A
signature keeps the least value of each of 128 hash functions over the set; documents that agree in all values of one of
32 bands are candidates, which pairs of similarity s are with probability 1 - (1 - s^4)^32: 0.99985 for 0.7. Candidates
whose signatures agree as a similar pair's might are compared truly, so no document is removed by chance.

The first of duplicates is kept, in the order of the documents: each document that is removed has a kept one before it to
which it is similar. So the result depends on nothing but the documents. Memory is 672 bytes a document: 512 of signature,
128 of group numbers, 16 of hash and 16 of bookkeeping, and an index entry for each band of those kept; texts stay on disk.

Source: Broder 1997 (MinHash); Rajaraman and Ullman, Mining of Massive Datasets, 3.4 (bands); the n-grams of RefinedWeb
(Penedo et al. 2023, appendix G.3), with a similarity that is computed and not taken from the signature.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from llama4_jax.data.preparation import words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likeness:
    """When two documents are near duplicates, and how they are found."""

    shingle_words: int = 5  # words in an n-gram
    threshold: float = 0.7  # Jaccard similarity from which a document is a near duplicate
    bands: int = 32  # of a signature; documents that share one are candidates
    rows: int = 4  # hashes in a band
    slack: float = 0.15  # a signature's estimate may fall short of the threshold by so much: 3.7 deviations
    seed: int = 0  # of the hash functions

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"Likeness.threshold={self.threshold} is a similarity, above 0 and at most 1")
        for name in ("shingle_words", "bands", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Likeness.{name}={getattr(self, name)} must be at least 1")

    @property
    def hashes(self) -> int:
        return self.bands * self.rows

    def chance(self, similarity: float) -> float:
        """Probability that a pair of this similarity shares a band."""
        return 1 - (1 - similarity**self.rows) ** self.bands


@dataclasses.dataclass
class Found:
    """What a search says.

    exact_of, near_of: the kept document that each is a duplicate of, or -1: int64 [n].
    candidates, compared, similar: pairs that shared a band; of those, compared truly; of those, near duplicates.
    """

    exact_of: np.ndarray
    near_of: np.ndarray
    candidates: int = 0
    compared: int = 0
    similar: int = 0

    @property
    def kept(self) -> np.ndarray:
        return (self.exact_of < 0) & (self.near_of < 0)


def digest(text: str) -> bytes:
    """16 bytes, equal for texts that differ in their spacing alone."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def signature(shingles: np.ndarray, likeness: Likeness) -> np.ndarray:
    """The least value of each hash function over a set that is not empty: uint32 [hashes]."""
    factors, terms = _family(likeness.hashes, likeness.seed)
    least = np.full(likeness.hashes, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(shingles), 1024):  # a block stays in the cache
        values = shingles[start : start + 1024, None] * factors + terms
        least = np.minimum(least, (values >> np.uint64(32)).astype(np.uint32).min(0))
    return least


@functools.lru_cache(maxsize=4)
def _family(hashes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors, odd, and terms of multiply-shift hashing (Dietzfelbinger et al. 1997)."""
    drawn = np.random.default_rng(seed).integers(0, 2**64, (2, hashes), np.uint64)
    return drawn[0] | np.uint64(1), drawn[1]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Similarity of two sorted sets."""
    common = np.intersect1d(one, other, assume_unique=True).size
    return common / max(one.size + other.size - common, 1)


def search(
    digests: Sequence[bytes],
    signatures: np.ndarray,
    shingles: Callable[[int], np.ndarray],
    likeness: Likeness,
) -> Found:
    """Marks every document that duplicates one kept before it.

    digests, signatures uint32 [n hashes]: of the documents in order. shingles(i): the sorted n-grams of document i; the
    last few hundred are remembered.
    """
    count = len(digests)
    found = Found(np.full(count, -1), np.full(count, -1))
    remembered = functools.lru_cache(maxsize=512)(shingles)
    groups = _groups(signatures, likeness)
    first: dict[bytes, int] = {}
    members: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for i in range(count):
        twin = first.setdefault(digests[i], i)
        if twin != i:
            # The twin may be gone itself: then the document kept for it stands for both.
            found.exact_of[i] = twin if found.near_of[twin] < 0 else found.near_of[twin]
            continue
        shared = [(band, group) for band, group in enumerate(groups[i].tolist()) if group >= 0]
        candidates = sorted(set().union(*(members.get(key, ()) for key in shared)))
        found.near_of[i] = _first_similar(i, candidates, signatures, remembered, likeness, found)
        if found.near_of[i] < 0:
            for key in shared:
                members[key].append(i)
    return found


def _first_similar(i, candidates, signatures, shingles, likeness: Likeness, found: Found) -> int:
    """The first of `candidates` that is a near duplicate of i, or -1; counts what it took."""
    found.candidates += len(candidates)
    if not candidates:
        return -1
    estimates = np.mean(signatures[candidates] == signatures[i], axis=1)
    for j in np.array(candidates)[estimates >= likeness.threshold - likeness.slack].tolist():
        found.compared += 1
        if jaccard(shingles(i), shingles(j)) >= likeness.threshold:
            found.similar += 1
            return j
    return -1


def _groups(signatures: np.ndarray, likeness: Likeness) -> np.ndarray:
    """The number of the group that shares each band with a document, -1 for a group of one: int32 [n bands]."""
    groups = np.full((len(signatures), likeness.bands), -1, np.int32)
    for band in range(likeness.bands if len(signatures) else 0):
        part = signatures[:, band * likeness.rows : (band + 1) * likeness.rows].astype(np.uint64)
        keys = np.zeros(len(part), np.uint64)
        for column in part.T:
            keys = words.mix(keys ^ column) + np.uint64(1)
        _, numbers, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        groups[:, band] = np.where(sizes[numbers] > 1, numbers, -1)
    return groups
