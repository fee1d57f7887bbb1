"""Where the wall time of a run goes, second by second: only steps that count are good.

Every second between the start of the loop and its end is charged to one kind. The account outlives the process: a
checkpoint holds it, and `metrics.jsonl` what came after the checkpoint, so that a resumed run knows the steps that it takes
again. What a killed process did after its last line of metrics is not known, nor how long nobody ran.

Source: "Introducing ML productivity goodput" (Google Cloud, 2024), without its time to be scheduled.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax

KINDS = {
    "step": "steps that count",
    "compile": "compiling steps",
    "data": "waiting for data",
    "checkpoint": "saving and restoring",
    "evaluate": "evaluations and other callbacks",
    "lost": "steps taken again after a restart or rollback",
    "other": "reports and the rest",
}
_REDONE = ("step", "data")  # what is lost with steps that no checkpoint holds


class Account:
    """Seconds by kind, over all processes of the run so far.

    `spent` has every kind, and sums to the wall time; `worked` says whether this process has taken a step.
    """

    def __init__(self):
        self.spent = dict.fromkeys(KINDS, 0.0)
        self._saved, self._lap = dict(self.spent), dict(self.spent)
        self._since, self.worked = time.perf_counter(), False

    def charge(self, kind: str) -> None:
        """Charges the time since the last charge to `kind`."""
        now = time.perf_counter()
        self.spent[kind] += now - self._since
        self._since, self.worked = now, self.worked or kind == "step"

    def lap(self, kind: str) -> float:
        """Seconds charged to `kind` since the last lap."""
        lap, self._lap[kind] = self.spent[kind] - self._lap[kind], self.spent[kind]
        return max(lap, 0.0)

    def saved(self) -> None:
        """A checkpoint holds everything up to here."""
        self._saved = dict(self.spent)

    def lose(self) -> None:
        """The steps since the last checkpoint will be taken again."""
        for kind in _REDONE:
            self.spent["lost"] += self.spent[kind] - self._saved[kind]
            self.spent[kind] = self._saved[kind]

    def resume(self, saved: Mapping[str, float], last: Mapping[str, float]) -> None:
        """Before the first charge: goes on from a checkpoint's account, in a run whose last line of metrics had `last`."""
        nothing = dict.fromkeys(KINDS, 0.0)
        self._saved = nothing | dict(saved)
        self.spent = nothing | dict(last if sum(last.values()) > sum(saved.values()) else saved)
        self.lose()
        self._lap = dict(self.spent)

    def fractions(self) -> dict[str, float]:
        """Shares of the wall time so far by "goodput/KIND", and "wall_seconds": one line of metrics."""
        wall = sum(self.spent.values())
        shares = {f"goodput/{kind}": seconds / max(wall, 1e-9) for kind, seconds in self.spent.items()}
        return shares | {"wall_seconds": wall}

    def table(self) -> str:
        """For a person: seconds and shares by kind."""
        wall = sum(self.spent.values())
        rows = [(KINDS[kind], seconds) for kind, seconds in self.spent.items()] + [("wall time", wall)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'where the time went':<{width}}  {'seconds':>9}  {'share':>7}"]
        lines += [f"{name:<{width}}  {seconds:>9.1f}  {seconds / max(wall, 1e-9):>7.1%}" for name, seconds in rows]
        return "\n".join(lines)


def recorded(line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by kind from a line of metrics that has `Account.fractions`; empty from another one."""
    wall = line.get("wall_seconds", 0.0)
    return {kind: wall * line[f"goodput/{kind}"] for kind in KINDS if f"goodput/{kind}" in line}


def programs_compiled() -> int:
    """How many programs this process has compiled, or fetched from JAX's cache, since this was first asked."""
    return len(_compiled())


@functools.cache
def _compiled() -> list[str]:
    events: list[str] = []

    def note(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    # There is no public way to take a listener back, hence one for the whole process.
    jax.monitoring.register_event_duration_secs_listener(note)
    return events
