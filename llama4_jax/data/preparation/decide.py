"""Which documents stay: good ones that duplicate none before them and give away no evaluation item, in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from llama4_jax.data.preparation import decontaminate, dedup, quality
from llama4_jax.data.preparation.decontaminate import Forbidden
from llama4_jax.data.preparation.settings import Settings

KEPT, EXACT, NEAR, LEAK = "kept", "exact duplicate", "near duplicate", "evaluation leak"
FATES = (KEPT, *quality.REASONS, EXACT, NEAR, LEAK)


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of each of n documents.

    fate: int8 [n], an index into FATES. witness: int64 [n], the kept document that one duplicates, or the evaluation
    item that it gives away; -1 for the others. found: the search for duplicates, whose rows are the good documents.
    common: n-grams of evaluation items in too many documents to count as leaks.
    """

    fate: np.ndarray
    witness: np.ndarray
    found: dedup.Found
    common: int

    def is_a(self, fate: str) -> np.ndarray:
        return self.fate == FATES.index(fate)


def decide(
    arrays: dict[str, np.ndarray], words_of: Callable[[int], np.ndarray], forbidden: Forbidden, settings: Settings
) -> Decision:
    """arrays: as `annotate` makes them, of all documents, with `hits` numbered accordingly.

    words_of(i): the word n-grams of document i, for comparing near duplicates.
    """
    fate = np.where(arrays["reason"] >= 0, arrays["reason"] + 1, 0).astype(np.int8)
    witness = np.full(len(fate), -1)
    good = np.flatnonzero(fate == 0)
    found = dedup.search(
        [row.tobytes() for row in arrays["digests"][good]],
        arrays["signatures"][good],
        lambda row: words_of(int(good[row])),
        settings.likeness,
    )
    for name, twins in ((EXACT, found.exact_of), (NEAR, found.near_of)):
        removed = twins >= 0
        fate[good[removed]], witness[good[removed]] = FATES.index(name), good[twins[removed]]
    kept = np.flatnonzero(fate == 0)
    given, common = decontaminate.leaks(_hits_of(kept, arrays["hits"]), forbidden, settings.overlap)
    leaking = kept[given >= 0]
    fate[leaking], witness[leaking] = FATES.index(LEAK), given[given >= 0]
    return Decision(fate, witness, found, common)


def _hits_of(documents: np.ndarray, hits: np.ndarray) -> Sequence[np.ndarray]:
    """The rows of (length, place) of each of `documents`; hits are in order of their documents."""
    starts = np.searchsorted(hits[:, 0], documents)
    ends = np.searchsorted(hits[:, 0], documents, "right")
    return [hits[start:end, 1:] for start, end in zip(starts, ends)]
