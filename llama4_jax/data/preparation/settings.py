"""What a preparation does, in one value: two runs with equal settings and sources write equal bytes."""

from __future__ import annotations

import dataclasses

from llama4_jax.data.preparation.decontaminate import Overlap
from llama4_jax.data.preparation.dedup import Likeness
from llama4_jax.data.preparation.quality import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The rules, and the sizes of what is written."""

    rule: Rule = Rule()  # which documents are good enough
    likeness: Likeness = Likeness()  # which are near duplicates
    overlap: Overlap = Overlap()  # which give away evaluation items
    seed: int = 0  # of the order of the documents in the shards
    sentences: bool = True  # whether records say where sentences begin and end
    part_bytes: int = 2_000_000  # of source files; a worker does one part at a time, and a killed run loses that much
    shard_bytes: int = 8_000_000  # of text in a shard

    def __post_init__(self):
        for name in ("part_bytes", "shard_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"Settings.{name}={getattr(self, name)} must be at least 1")
