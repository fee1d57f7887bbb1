"""What a run reports while it goes: a progress bar, one JSON line per logged step, and TensorBoard events.

`metrics.jsonl` is the record: after any sequence of kills and resumes it holds each logged step once, as an
uninterrupted run would have written it (times apart), because a resumed run drops the lines after its checkpoint.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


class Reporter:
    """Writes metrics under `folder` and draws the progress bar of a run of `steps` steps."""

    def __init__(self, folder: str | pathlib.Path, *, step: int, steps: int):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "metrics.jsonl"
        # A log file wants a line now and then, a terminal a moving bar.
        pause = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=steps, unit="step", mininterval=pause, dynamic_ncols=True, smoothing=0.05)
        self._events = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forgets everything reported after `step`, and half a last line if the process was killed writing it."""
        kept = [line for line in read(self._path) if line["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._path)
        if self._events:
            self._events.close()
        self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        self._bar.n = self._bar.initial = self._bar.last_print_n = step
        self._bar.start_t = self._bar.last_print_t = time.time()
        self._bar.refresh()

    def advance(self) -> None:
        """One step was taken."""
        self._bar.update(1)

    def write(self, step: int, values: Mapping[str, Any] | None) -> None:
        """Records `values` (numbers, arrays or strings) at `step`, if any; numbers go to TensorBoard too."""
        if not values:
            return
        values = {name: _plain(value) for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def show(self, loss: float, tokens_per_second: float) -> None:
        """Sets what stands behind the bar; the bar itself shows steps, time taken and time left."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s", refresh=False)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._events.close()


class Silent:
    """A Reporter's place in a process that does not report: process 0 does, for all."""

    def rewind(self, step: int) -> None: ...

    def advance(self) -> None: ...

    def write(self, step: int, values: Mapping[str, Any] | None) -> None: ...

    def show(self, loss: float, tokens_per_second: float) -> None: ...

    def say(self, message: str) -> None: ...

    def close(self) -> None: ...


class Stopwatch:
    """Seconds and tokens of training proper: pauses (evaluation, saving) are not counted."""

    def __init__(self, *, seconds: float = 0.0, tokens: int = 0):
        self.seconds, self.tokens = seconds, tokens  # since the run began, over all its processes
        self._lap_seconds, self._lap_tokens = seconds, tokens
        self._since = time.perf_counter()

    def count(self, tokens: int) -> None:
        """Adds one step's tokens and the time since the last call of `count` or `skip`."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        self.tokens += tokens

    def skip(self) -> None:
        """Leaves the time since the last call of `count` out of account."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Tokens a second since the last lap."""
        rate = (self.tokens - self._lap_tokens) / max(self.seconds - self._lap_seconds, 1e-9)
        self._lap_seconds, self._lap_tokens = self.seconds, self.tokens
        return rate


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; an unfinished last line is left out, a missing file is empty."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    complete, newline, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete.split("\n")] if newline else []


def _plain(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array.tolist()
