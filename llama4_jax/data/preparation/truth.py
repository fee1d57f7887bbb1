"""The exhaustive answers that the fast searches are measured against: every pair of documents, every run of words."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse

from llama4_jax.data.preparation import dedup, words
from llama4_jax.data.preparation.decontaminate import Overlap


def similar_pairs(sets: Sequence[np.ndarray], floor: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of sets with a Jaccard similarity of `floor` > 0 or more: (int [pairs 2] with i < j, similarity [pairs]).

    sets: sorted n-grams of each document. Counts common members by a product of sparse matrices, a block of rows at a
    time: n^2 work, for measuring alone.
    """
    _, columns = np.unique(np.concatenate([*sets, np.zeros(0, np.uint64)]), return_inverse=True)
    sizes = np.array([len(members) for members in sets])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    matrix = scipy.sparse.csr_array((np.ones(len(columns), np.int32), columns, ends))
    pairs, similarities = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    for start in range(0, len(sets), 256):
        common = (matrix[start : start + 256] @ matrix.T).tocoo()
        i, j = common.row + start, common.col
        similarity = common.data / (sizes[i] + sizes[j] - common.data)
        chosen = (i < j) & (similarity >= floor)
        pairs.append(np.stack([i, j], -1)[chosen])
        similarities.append(similarity[chosen])
    return np.concatenate(pairs), np.concatenate(similarities)


def duplicates(count: int, pairs: np.ndarray) -> np.ndarray:
    """Which of `count` documents have a kept one before them among `pairs` of near duplicates: bool [count]."""
    before: dict[int, list[int]] = {}
    for i, j in pairs.tolist():
        before.setdefault(j, []).append(i)
    removed = np.zeros(count, bool)
    for document in sorted(before):
        removed[document] = any(not removed[other] for other in before[document])
    return removed


def unverified(
    signatures: np.ndarray, pairs: np.ndarray, similarities: np.ndarray, likeness: dedup.Likeness
) -> tuple[int, int]:
    """(false, all) pairs that signatures alone would call near duplicates, among `pairs`: why candidates are compared.

    pairs, similarities: of `similar_pairs` with a floor well under the threshold.
    """
    estimates = np.array([np.mean(signatures[i] == signatures[j]) for i, j in pairs.tolist()])
    called = estimates >= likeness.threshold
    return int(np.sum(called & (similarities < likeness.threshold))), int(np.sum(called))


def giveaways(texts: Sequence[str], items: Mapping[str, str], overlap: Overlap) -> np.ndarray:
    """Which texts give an evaluation item away, by comparing the words themselves and not hashes: bool [texts]."""
    forbidden: dict[int, set[str]] = {}
    for item in map(words.split, items.values()):
        length = min(overlap.words, len(item))
        if length >= overlap.min_words:
            forbidden.setdefault(length, set()).update(_runs(item, length))
    found = []
    for text in map(words.split, texts):
        found.append({run for length, runs in forbidden.items() for run in _runs(text, length) if run in runs})
    counts = collections.Counter(run for runs in found for run in runs)
    return np.array([any(counts[run] <= overlap.common_after for run in runs) for runs in found], bool)


def _runs(split: list[str], length: int) -> list[str]:
    return [" ".join(split[start : start + length]) for start in range(len(split) - length + 1)]
