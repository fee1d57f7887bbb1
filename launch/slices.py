"""TPU slices as Google Cloud sells them: chips a host, topologies, and the names that each tool has for them.

Source: Google Cloud, "Plan TPUs in GKE" (accelerator labels, topologies, chips a node) and "TPU configurations" (types of
queued resources), as of 2025.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation. Invariant: every topology of more than one host has `per_host` chips on each."""

    gke: str  # value of the node label cloud.google.com/gke-tpu-accelerator
    per_host: int  # chips a host, in slices of several hosts
    cores: int  # that accelerator types of queued resources count for a chip
    prefix: str  # of those types
    runtime: str | None  # software version of queued resources; None where it is not known here
    topologies: tuple[str, ...]  # those that exist, smallest first


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
CHIPS = {
    "v5e": Chip("tpu-v5-lite-podslice", 4, 1, "v5litepod", "v2-alpha-tpuv5-lite", _FLAT),
    "v5p": Chip("tpu-v5p-slice", 4, 2, "v5p", "v2-alpha-tpuv5", _CUBES),
    "v6e": Chip("tpu-v6e-slice", 4, 1, "v6e", "v2-alpha-tpuv6e", _FLAT),
    "tpu7x": Chip("tpu7x", 4, 2, "tpu7x", None, _CUBES),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice: a chip's name and a topology that exists of it. Raises ValueError for any other, with those that do."""

    chip: str
    topology: str

    def __post_init__(self):
        if self.chip not in CHIPS:
            raise ValueError(f"chip {self.chip!r} is unknown; use one of {', '.join(CHIPS)}")
        known = CHIPS[self.chip].topologies
        if self.topology not in known:
            raise ValueError(f"{self.chip} has no topology {self.topology!r}; use one of {', '.join(known)}")

    @property
    def kind(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_per_host(self) -> int:
        return min(self.chips, self.kind.per_host)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """As queued resources and xpk name it: v5p-256 is 128 chips of two cores."""
        return f"{self.kind.prefix}-{self.chips * self.kind.cores}"


def parse(text: str | None) -> Slice:
    """The slice that a flag such as v5p:4x4x8 names; raises ValueError for one that does not exist."""
    chip, colon, topology = (text or "").partition(":")
    if not colon:
        raise ValueError(f"wanted a chip and a topology such as v5p:4x4x8, got {text!r}")
    return Slice(chip, topology)
