"""Where a position of the normalised text was in the source, kept as the few places where the difference changes."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Sequence

import numpy as np

_REPLACEMENT_BYTES = len("\N{REPLACEMENT CHARACTER}".encode())


@dataclasses.dataclass(frozen=True, eq=False)
class Offsets:
    """A map from byte positions of a text to byte positions of what it was made from.

    places: int64 [n], increasing. shifts: int64 [n]. A position p >= places[i], before the next place, was at
    p + shifts[i] in the source; before the first place nothing moved. Only positions between characters are mapped
    truly. `len(offsets)` is 0 for a text that is its source.
    """

    places: np.ndarray
    shifts: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def to_source(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the source, of any shape."""
        positions = np.asarray(positions)
        return positions + self._shift(positions)

    def as_list(self) -> list[list[int]]:
        """[place, shift] of each change, for JSON."""
        return np.stack([self.places, self.shifts], -1).tolist()

    @staticmethod
    def of_list(pairs: Sequence[Sequence[int]]) -> Offsets:
        places, shifts = np.array(pairs, np.int64).reshape(-1, 2).T
        return Offsets(places, shifts)

    @staticmethod
    def identity() -> Offsets:
        return Offsets.of_list([])

    @staticmethod
    def of_positions(sources: np.ndarray) -> Offsets:
        """From the source position of every position of the text, the end included."""
        places = np.arange(len(sources))
        return Offsets._where_changed(places, np.asarray(sources, np.int64) - places)

    @staticmethod
    def of_repairs(spans: Sequence[tuple[int, int]]) -> Offsets:
        """For a text in which each of these spans of the source became one U+FFFD."""
        ends = np.array([end for _, end in spans], np.int64)
        grown = np.cumsum([_REPLACEMENT_BYTES - (end - start) for start, end in spans])
        return Offsets._where_changed(ends + grown, -grown)

    @staticmethod
    def _where_changed(places: np.ndarray, shifts: np.ndarray) -> Offsets:
        changed = np.diff(shifts, prepend=0) != 0
        return Offsets(places[changed], shifts[changed])

    def _shift(self, positions: np.ndarray) -> np.ndarray:
        found = np.searchsorted(self.places, positions, "right")
        return np.concatenate([[0], self.shifts])[found]


def repaired_spans(source: bytes) -> list[tuple[int, int]]:
    """The maximal ill-formed runs of `source`, each of which a repair replaces: [start, end) in bytes.

    Source: Unicode 15, section 3.9, "U+FFFD substitution of maximal subparts", as Python and ICU do it.
    """
    spans, start, view = [], 0, memoryview(source)
    while True:
        try:
            codecs.utf_8_decode(view[start:], "strict", True)
            return spans
        except UnicodeDecodeError as error:
            spans.append((start + error.start, start + error.end))
            start += error.end
