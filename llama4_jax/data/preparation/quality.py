"""Which documents are worth training on: ratios of their words and lines, and the rule that rejects by them.

The thresholds are loose: they take out tables, minified code, binary and broken files, and leave prose and source code of
any script. The reason is the first rule that a document breaks, and every rejected document is counted under one.

Source: the rules follow Gopher (Rae et al. 2021, appendix A1.1) and the filters for code of Codex (Chen et al. 2021, 3.1).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Bounds that a document keeps; shares are from 0 to 1."""

    min_words: int = 30  # below: nothing to learn from, and n-grams of five words say nothing
    max_repaired: float = 0.001  # share of bytes that were no UTF-8; above: another encoding, not damage
    max_control: float = 0.0005  # share of control characters; above: a binary file
    max_digits: float = 0.35  # share of words that are numbers; above: a table
    max_punctuation: float = 0.65  # share of words that are signs; source code has about 0.4
    max_upper_case: float = 0.5  # share of words in capitals; above: a list of constants
    max_mean_line: float = 1000.0  # characters; above: minified or generated (prose may have a paragraph a line)
    max_repeated_lines: float = 0.5  # share of lines that came before in the document; above: boilerplate

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"Rule.{field.name}={getattr(self, field.name)} must not be negative")

    def reason(self, ratios: Mapping[str, float]) -> str | None:
        """Why a document is rejected, by the name of the bound without its max_ or min_; None for a good one."""
        for field in dataclasses.fields(self):
            side, name = field.name.split("_", 1)
            bound = getattr(self, field.name)
            if (ratios[name] < bound) if side == "min" else (ratios[name] > bound):
                return name
        return None


REASONS = tuple(field.name.split("_", 1)[1] for field in dataclasses.fields(Rule))


def ratios(text: str, *, words: int, shapes: Mapping[str, float], repaired: float) -> dict[str, float]:
    """All that the rule looks at, and the other shapes for whoever reads the record.

    words, shapes: of `normalise.Makeup`. repaired: share of the source's bytes.
    """
    lines = [line.strip() for line in text.splitlines()]
    filled = [line for line in lines if len(line) > 3]  # closing brackets and rules repeat in any good file
    repeated = sum(Counter(filled).values()) - len(set(filled))
    measured = {
        "words": words,
        "repaired": repaired,
        "control": len(_CONTROL.findall(text)) / max(len(text), 1),
        "mean_line": sum(map(len, lines)) / max(len(lines), 1),
        "repeated_lines": repeated / max(len(filled), 1),
    }
    return {name: round(value, 5) for name, value in {**measured, **shapes}.items()}
