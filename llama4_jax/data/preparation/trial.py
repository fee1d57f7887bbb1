"""How well a finished preparation did: what it found of what was planted and of what exhaustive search finds.

Needs the annotated parts (`keep_work=True`): the truth is asked about documents that were removed, too.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from llama4_jax.data.preparation import prepare, truth
from llama4_jax.data.preparation.corpus import Item
from llama4_jax.data.preparation.decide import EXACT, KEPT, LEAK, NEAR
from llama4_jax.data.preparation.settings import Settings

PLANTED = "planted"  # the source whose documents planting made


@dataclasses.dataclass(frozen=True)
class Score:
    """A search against the truth, over `documents`: how many should be removed, were, and both."""

    documents: int
    expected: int
    found: int
    right: int

    @property
    def missed(self) -> int:
        return self.expected - self.right

    @property
    def false(self) -> int:
        return self.found - self.right

    @property
    def false_rate(self) -> float:
        """Of the documents that should stay, the share that was removed."""
        return self.false / max(self.documents - self.expected, 1)

    @staticmethod
    def of(expected: np.ndarray, found: np.ndarray) -> Score:
        return Score(len(found), int(expected.sum()), int(found.sum()), int((expected & found).sum()))


@dataclasses.dataclass(frozen=True)
class Trial:
    """Scores over real documents and over each kind of plant, and the pairs that signatures alone would have called."""

    duplicates: Score
    leaks: Score
    planted: Mapping[str, Score]
    rejected: Mapping[str, int]  # plants of each kind that the rule of quality removed before
    pairs_similar: int  # of real documents, by exhaustive search
    pairs_called: int  # by signatures alone
    pairs_called_falsely: int


def judge(
    folder: pathlib.Path,
    items: Sequence[Item],
    evaluation: Mapping[str, str],
    kinds: Mapping[str, str],
    settings: Settings,
) -> Trial:
    """kinds: the kind of each plant, by the name of its document."""
    fates = _fates(folder, items)
    arrays = prepare.load(folder)
    good = np.flatnonzero(arrays["reason"] < 0)
    removed = np.isin(fates, (EXACT, NEAR))[good]
    word_sets = list(map(prepare.words_of(folder, settings), good.tolist()))
    floor = settings.likeness.threshold - 2 * settings.likeness.slack
    pairs, similarities = truth.similar_pairs(word_sets, max(floor, 0.01))
    expected = truth.duplicates(len(good), pairs[similarities >= settings.likeness.threshold])
    remaining = good[~removed]
    text = prepare.texts(folder)
    given = truth.giveaways([text(document) for document in remaining.tolist()], evaluation, settings.overlap)
    leaking = fates[remaining] == LEAK
    kind_of = np.array([kinds.get(item.name, "") if item.source == PLANTED else "" for item in items])
    real_pairs = np.all(kind_of[good][pairs] == "", axis=1)
    false, called = truth.unverified(
        arrays["signatures"][good], pairs[real_pairs], similarities[real_pairs], settings.likeness
    )
    planted = {}
    for kind in dict.fromkeys(kinds.values()):
        copies, leaks = kind_of[good] == kind, kind_of[remaining] == kind
        is_copy = kind.startswith("copy")
        planted[kind] = (
            Score.of(expected[copies], removed[copies]) if is_copy else Score.of(given[leaks], leaking[leaks])
        )
    lost = collections.Counter(kind_of[(arrays["reason"] >= 0) & (kind_of != "")].tolist())
    return Trial(
        duplicates=Score.of(*(row[kind_of[good] == ""] for row in (expected, removed))),
        leaks=Score.of(*(row[kind_of[remaining] == ""] for row in (given, leaking))),
        planted=planted,
        rejected={kind: lost[kind] for kind in planted},
        pairs_similar=int(np.sum(similarities[real_pairs] >= settings.likeness.threshold)),
        pairs_called=called,
        pairs_called_falsely=false,
    )


def _fates(folder: pathlib.Path, items: Sequence[Item]) -> np.ndarray:
    """What became of each document, as removed.jsonl says it."""
    lines = map(json.loads, (folder / prepare.REMOVED).read_text(encoding="utf-8").splitlines())
    gone = {(line["source"], line["name"]): line["reason"] for line in lines}
    return np.array([gone.get((item.source, item.name), KEPT) for item in items])
