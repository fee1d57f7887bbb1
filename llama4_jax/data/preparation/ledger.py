"""Which files of a preparation are finished: the record that a killed run goes on from.

`ledger.jsonl` has the fingerprint of what is prepared in its first line, and then a line for each file that was written
whole and renamed. A file counts as finished if it is in the ledger with the size and hash that it has now.
"""

from __future__ import annotations

import hashlib
import json
import pathlib

NAME = "ledger.jsonl"


class Ledger:
    """The finished files in `folder`, by their path in it."""

    def __init__(self, folder: str | pathlib.Path, fingerprint: str):
        """Opens the ledger, or begins one. Raises ValueError for a folder in which something else was prepared."""
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / NAME
        lines = _whole_lines(self._path)
        if lines and lines[0] != {"fingerprint": fingerprint}:
            raise ValueError(
                f"{self.folder} holds a preparation with fingerprint {lines[0].get('fingerprint')}, wanted "
                f"{fingerprint}: its settings, sources or evaluation sets are others; give another folder, or remove it"
            )
        self._finished = {line["file"]: line for line in lines[1:]}
        self._rewrite([{"fingerprint": fingerprint}, *self._finished.values()])

    def has(self, name: str) -> bool:
        """Whether this file is finished and as it was then."""
        path, line = self.folder / name, self._finished.get(name)
        return line is not None and path.exists() and line == describe(path, name)

    def add(self, name: str) -> None:
        """Records a file that lies in the folder under its final name."""
        self._finished[name] = describe(self.folder / name, name)
        with self._path.open("a") as file:
            file.write(json.dumps(self._finished[name]) + "\n")

    def __getitem__(self, name: str) -> dict:
        """{"file", "bytes", "sha256"} of a finished file."""
        return self._finished[name]

    def _rewrite(self, lines: list[dict]) -> None:
        write(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def describe(path: pathlib.Path, name: str) -> dict:
    """{"file": name, "bytes", "sha256"} of the file at `path`."""
    with path.open("rb") as file:
        return {"file": name, "bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it: it is there whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _whole_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a ledger, without half a last one that a kill left."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
