"""Plants duplicates and leaks among real text, to see whether a preparation finds them.

Copies of real documents: as they are; with other spacing, line ends and decomposed accents; with a share of their words
replaced. Documents that give an evaluation item away: all of it, in other case and punctuation, a run of just so many
words, and, as a control that nothing should find, all of it with every sixth word replaced.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from llama4_jax.data.preparation import words

EDIT_RATES = (0.01, 0.02, 0.03, 0.05, 0.1)
_WORD = re.compile(r"\w+")
_CONTROL_STEP = 6  # one word in so many is replaced: no run of words is long enough to be a leak


@dataclasses.dataclass(frozen=True)
class Plant:
    """A made document: of which kind, of which document or item, and its text."""

    kind: str
    of: str
    text: str


def copies(originals: Mapping[str, str], per_kind: int, seed: int) -> list[Plant]:
    """`per_kind` copies of each kind, each of another of the `originals` (text by name)."""
    draw = np.random.default_rng((seed, 0))
    kinds = {"copy": lambda text: text, "copy, spaced otherwise": _respaced}
    for rate in EDIT_RATES:
        kinds[f"copy, {100 * rate:.0f} % of words"] = lambda text, rate=rate: _edited(text, rate, draw)
    chosen = _choose(list(originals), per_kind * len(kinds), draw, "documents of 200 words or more")
    return [
        Plant(kind, name, change(originals[name]))
        for number, (kind, change) in enumerate(kinds.items())
        for name in chosen[number * per_kind : (number + 1) * per_kind]
    ]


def leaks(items: Mapping[str, str], filling: Sequence[str], per_kind: int, run: int, seed: int) -> list[Plant]:
    """`per_kind` documents of each kind that give away another of `items`, among words drawn from `filling`.

    run: words that are just enough for a leak.
    """
    draw = np.random.default_rng((seed, 1))
    kinds = {
        "leak, whole item": lambda text: text,
        "leak, other case and signs": lambda text: " ".join(words.split(text)).upper(),
        f"leak, {run} words": lambda text: _run_of(text, run, draw),
        f"no leak, {run - 1} words": lambda text: _run_of(text, run - 1, draw),
        "no leak, every 6th word new": lambda text: _every_so_many(text, filling, draw),
    }
    chosen = _choose(list(items), per_kind * len(kinds), draw, f"items of {run} words or more")
    plants = []
    for number, (kind, change) in enumerate(kinds.items()):
        for name in chosen[number * per_kind : (number + 1) * per_kind]:
            before, after = (" ".join(draw.choice(filling, 100)) for _ in range(2))
            plants.append(Plant(kind, name, f"{before}\n\n{change(items[name])}\n\n{after}\n"))
    return plants


def _choose(names: list[str], count: int, draw: np.random.Generator, wanted: str) -> list[str]:
    if len(names) < count:
        raise ValueError(f"wanted {count} {wanted} to plant from, got {len(names)}; plant fewer, or add sources")
    return [names[i] for i in draw.choice(len(names), count, replace=False)]


def _respaced(text: str) -> str:
    return unicodedata.normalize("NFD", text).replace(" ", "  ").replace("\n", " \r\n") + "\n\n"


def _edited(text: str, rate: float, draw: np.random.Generator) -> str:
    """Each word becomes, with probability `rate`, another word of the same text."""
    own = _WORD.findall(text)
    return _WORD.sub(lambda word: str(draw.choice(own)) if draw.random() < rate else word.group(), text)


def _run_of(text: str, length: int, draw: np.random.Generator) -> str:
    split = words.split(text)
    start = int(draw.integers(len(split) - length + 1))
    return " ".join(split[start : start + length])


def _every_so_many(text: str, filling: Sequence[str], draw: np.random.Generator) -> str:
    split = words.split(text)
    split[_CONTROL_STEP - 1 :: _CONTROL_STEP] = draw.choice(filling, len(split[_CONTROL_STEP - 1 :: _CONTROL_STEP]))
    return " ".join(split)
