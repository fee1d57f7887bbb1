"""What a preparation says of itself: the counts of the manifest, and a line for every document that was removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from llama4_jax.data.preparation import scripts
from llama4_jax.data.preparation.corpus import Item
from llama4_jax.data.preparation.decide import EXACT, FATES, KEPT, LEAK, NEAR, Decision
from llama4_jax.data.preparation.decontaminate import Forbidden


def of_sources(
    items: Sequence[Item],
    arrays: Mapping[str, np.ndarray],
    decision: Decision,
    licences: Mapping[str, str],
    languages: Sequence[str],
) -> dict[str, dict]:
    """For each source: licence, counts, a hash over its documents, what became of them and what is left."""
    owners = np.array([item.source for item in items])
    found = {}
    for name, licence in licences.items():
        rows = np.flatnonzero(owners == name)
        kept = rows[decision.fate[rows] == FATES.index(KEPT)]
        counts = np.bincount(decision.fate[rows], minlength=len(FATES)).tolist()
        found[name] = {
            "licence": licence,
            "documents": len(rows),
            "bytes": int(arrays["source_bytes"][rows].sum()),
            # Over the blake2b-128 of each document's bytes, in order.
            "sha256": hashlib.sha256(arrays["contents"][rows].tobytes()).hexdigest(),
            "repaired_bytes": int(arrays["repaired"][rows].sum()),
            "kept": {"documents": len(kept), "bytes": int(arrays["text_bytes"][kept].sum())},
            "removed": {fate: count for fate, count in zip(FATES, counts) if count and fate != KEPT},
            "scripts": _shares(arrays["scripts"][kept], scripts.NAMES),
            "languages": _shares(arrays["languages"][kept], languages),
        }
    return found


def _shares(characters: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Shares of characters [documents names], the largest first, to a hundredth of a per cent."""
    total = characters.sum(0, dtype=np.float64)
    order = np.argsort(-total, kind="stable")
    shares = {names[i]: round(float(total[i] / max(total.sum(), 1)), 4) for i in order}
    return {name: share for name, share in shares.items() if share}


def of_duplicates(decision: Decision) -> dict[str, int]:
    found = decision.found
    counts = {fate: int(decision.is_a(fate).sum()) for fate in (EXACT, NEAR)}
    return {**counts, "candidates": found.candidates, "compared": found.compared, "similar": found.similar}


def of_evaluation(evaluation: Mapping[str, Mapping[str, str]], decision: Decision, forbidden: Forbidden) -> dict:
    """For each set: items, a hash of them, and how many documents gave one away."""
    given = [forbidden.names[item] for item in decision.witness[decision.is_a(LEAK)].tolist()]
    sets = {
        name: {
            "items": len(items),
            "sha256": hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest(),
            "documents_removed": sum(item.startswith(f"{name}/") for item in given),
        }
        for name, items in evaluation.items()
    }
    return {"sets": sets, "items_too_short": forbidden.unchecked, "common_ngrams": decision.common}


def removed(items: Sequence[Item], decision: Decision, forbidden: Forbidden) -> str:
    """A line of JSON for each document that is gone: where it was, why, and what it duplicates or gives away."""
    lines = []
    for row in np.flatnonzero(~decision.is_a(KEPT)).tolist():
        item, fate, witness = items[row], FATES[decision.fate[row]], int(decision.witness[row])
        line = {"source": item.source, "name": item.name, "reason": fate}
        if fate == LEAK:
            line["of"] = forbidden.names[witness]
        elif witness >= 0:
            line["of"] = f"{items[witness].source}/{items[witness].name}"
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)
