"""Variants of one thing measured with several seeds: whether they come in the expected order, as a table, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")  # files only: no window, no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#6b7280", "#b42318", "#d98c1f", "#3b5b92", "#1a7f37", "#7c3aed")

Measured = Mapping[str, Sequence[float]]  # by variant, a number for each seed


def disagreements(measured: Measured, order: Sequence[tuple[str, str]], tolerance: float) -> list[str]:
    """Pairs of `order`, (lower, higher), whose means are the other way round by more than `tolerance`, in words."""
    mean = {name: float(np.mean(numbers)) for name, numbers in measured.items()}
    return [
        f"{lower} ({mean[lower]:.4f}) is above {higher} ({mean[higher]:.4f})"
        for lower, higher in order
        if mean[lower] > mean[higher] + tolerance
    ]


def table(columns: Mapping[str, Measured], digits: int = 4) -> str:
    """A line for each variant, a column for each quantity: the mean over seeds, and the least and greatest."""
    variants = list(next(iter(columns.values())))
    rows = [["", *columns]] + [
        [name, *(_spread(column[name], digits) for column in columns.values())] for name in variants
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def bars(panels: Mapping[str, Measured]) -> Figure:
    """A panel for each quantity: a bar for the mean of each variant, a dot for each seed. Variants keep their colours."""
    variants = list(dict.fromkeys(name for measured in panels.values() for name in measured))
    colours = dict(zip(variants, COLOURS))
    figure, drawn = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axes, (title, measured) in zip(drawn[0], panels.items()):
        for place, (name, numbers) in enumerate(measured.items()):
            axes.barh(place, np.mean(numbers), color=colours[name], alpha=0.8, height=0.6)
            axes.plot(numbers, [place] * len(numbers), "o", color="black", ms=3.5)
        axes.set(yticks=range(len(measured)), yticklabels=list(measured))
        axes.set_title(title, fontsize=10)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _spread(numbers: Sequence[float], digits: int) -> str:
    return f"{np.mean(numbers):.{digits}f} ({min(numbers):.{digits}f}..{max(numbers):.{digits}f})"
