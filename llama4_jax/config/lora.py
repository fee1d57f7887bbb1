"""Which weights get low-rank adapters, and how large: Hu et al. 2021, "LoRA: Low-Rank Adaptation of LLMs".

Targets are patterns over the dotted names of parameters: `experts.gate_up` is that parameter in every layer,
`decoder.tail.3.*` all that can be adapted in one layer that stands alone. The groups below are the usual choices; add
them up.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math

ATTENTION = ("attention.*",)
DENSE = ("feed_forward.gate_up.kernel", "feed_forward.down.kernel")  # feed-forward of layers without experts
SHARED_EXPERTS = ("feed_forward.shared.*",)
ROUTED_EXPERTS = ("feed_forward.experts.*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters of one model: W + scale * A B for each target W, with A random and B zero at the start."""

    rank: int = 16  # width between A and B
    alpha: float = 32.0  # the product is multiplied by alpha / rank
    targets: tuple[str, ...] = ATTENTION  # patterns (* and ?) that a parameter's dotted name ends with
    rank_stabilised: bool = False  # multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023)

    def __post_init__(self):
        if not self.rank >= 1 or not self.alpha > 0:
            raise ValueError(f"LoraConfig: rank={self.rank} and alpha={self.alpha} must be positive")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(
                f"LoraConfig.targets={self.targets!r}: wanted a tuple of one pattern or more, such as {ATTENTION}"
            )

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's dotted name ends, at a dot or as a whole, with what the pattern describes."""
    return fnmatch.fnmatchcase("." + name, "*." + pattern)
