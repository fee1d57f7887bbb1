"""How many calibration tokens each routed expert saw: an expert without any is rounded blindly."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Calibration tokens of each routed expert, [e] for each layer that is a mixture."""

    chosen: Mapping[int, np.ndarray]  # by the router
    used: Mapping[int, np.ndarray]  # with those that were added

    def starved(self, least: int = 1) -> list[tuple[int, int]]:
        """(layer, expert) of those that used fewer than `least`."""
        return [(layer, int(e)) for layer, used in self.used.items() for e in np.flatnonzero(used < least)]

    def table(self) -> str:
        """A line a layer: fewest, median and most tokens of an expert, and how many experts were given more."""
        lines = [f"{'layer':>5}  {'fewest':>8}  {'median':>8}  {'most':>8}  {'given more':>10}"]
        for layer, chosen in self.chosen.items():
            numbers = f"{chosen.min():>8}  {int(np.median(chosen)):>8}  {chosen.max():>8}"
            lines.append(f"{layer:>5}  {numbers}  {np.sum(self.used[layer] > chosen):>10}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, dict[str, list[int]]]:
        """Lists for JSON, by layer."""
        pairs = {layer: {"chosen": self.chosen[layer], "used": self.used[layer]} for layer in self.chosen}
        return {str(layer): {name: row.tolist() for name, row in pair.items()} for layer, pair in pairs.items()}

    def warn(self) -> None:
        """Logs a warning if there are experts without any token."""
        if starved := self.starved():
            shown = ", ".join(map(str, starved[:8])) + (" ..." if len(starved) > 8 else "")
            logger.warning(
                "no calibration token for %d experts, which are rounded to nearest; (layer, expert): %s; give more text, or "
                "extra_tokens",
                len(starved),
                shown,
            )
