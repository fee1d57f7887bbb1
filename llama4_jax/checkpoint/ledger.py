"""What a long piece of work in a folder has finished, written down so that a later process goes on from there.

A ledger is a file of JSON lines: first what the work is, then a line for each unit that is complete. A process killed
at any moment leaves at most half a last line, which is dropped: its unit is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

NAME = "ledger.jsonl"


class Ledger:
    """The ledger of `folder`, which is made if there is none. Use it as a context manager.

    `work` (JSON) says what is done; `done` gives for each finished unit what `add` was told of it. Raises ValueError
    where the folder belongs to other work, BlockingIOError where another process is at it.
    """

    def __init__(self, folder: pathlib.Path, work: Mapping[str, Any]):
        self._path = folder / NAME
        self._work = json.loads(json.dumps(work))
        if folder.exists() and not self._path.is_file():
            raise ValueError(f"{folder} exists and has no {NAME}, so it is not ours; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BlockingIOError(f"another process is writing to {folder}; wait for it or end it") from error
        try:
            self.done = self._read()
        except ValueError:
            self._file.close()
            raise
        self._rewrite()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, unit: str, record: Any) -> None:
        """`unit` is complete."""
        self.done[unit] = record
        self._file.write(_line([unit, record]))
        self._file.flush()

    def drop(self, units: Iterable[str]) -> None:
        """`units` are to be done again."""
        self.done = {unit: record for unit, record in self.done.items() if unit not in set(units)}
        self._rewrite()

    def _read(self) -> dict[str, Any]:
        self._file.seek(0)
        complete = [line for line in self._file.readlines() if line.endswith(b"\n")]
        if not complete:
            return {}
        work, *units = map(json.loads, complete)
        differences = [
            f"{name}: there {_short(work.get(name))}, now {_short(self._work.get(name))}"
            for name in sorted({*work, *self._work})
            if work.get(name) != self._work.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self._path.parent} is unfinished work of another kind:\n  " + "\n  ".join(differences) + "\n"
                "Give what was given then to finish it, or delete that folder to start anew."
            )
        return dict(units)

    def _rewrite(self) -> None:
        """Brings the file to what `done` says. The work stands in it before any unit does."""
        self._file.seek(0)
        lines = [_line(self._work), *(_line([unit, record]) for unit, record in self.done.items())]
        if self._file.read() != b"".join(lines):
            self._file.truncate(0)
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
