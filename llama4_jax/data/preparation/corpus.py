"""The documents that preparation starts from: where each is, under which licence, and how to read its bytes.

A listing is in order of the sources and, within each, of the names: that order decides which of two duplicates is kept.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import glob
import gzip
import importlib
import json
import pathlib
import sysconfig
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llama4_jax.data import text
from llama4_jax.data.preparation import roff

PYTHON_LICENCE = "PSF-2.0"
MANUAL_LICENCE = "each page's own, see /usr/share/doc/*/copyright"


class Form(enum.Enum):
    """How a document lies in its file."""

    FILE = "file"  # the file is the document
    LINE = "line"  # a line of JSON with a field "text"
    DOCSTRINGS = "docstrings"  # those of a Python module
    TOPIC = "topic"  # of Python's help()
    MANUAL = "manual"  # a gzipped manual page


class Item(NamedTuple):
    """One document that can be read anywhere: `size` bytes from `start` of the file at `path`."""

    source: str
    name: str
    form: Form
    path: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents of one origin and licence."""

    name: str
    licence: str
    items: tuple[Item, ...]


def read(item: Item) -> bytes:
    """The document as it was found; text only where its form says so. Raises ValueError for a line without text."""
    if item.form is Form.TOPIC:
        return _topics()[item.path].encode()
    if item.form is Form.MANUAL:
        # Repair belongs to a later stage: surrogates carry bytes that are no UTF-8 through to it.
        page = gzip.decompress(pathlib.Path(item.path).read_bytes()).decode("utf-8", "surrogateescape")
        return roff.plain(page).encode("utf-8", "surrogateescape")
    with open(item.path, "rb") as file:
        file.seek(item.start)
        content = file.read(item.size)
    if item.form is Form.LINE:
        return _text_of(item, content)
    return _docstrings(content) if item.form is Form.DOCSTRINGS else content


def _text_of(item: Item, line: bytes) -> bytes:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{item.name}: wanted an object with a string "text", got {line[:60]!r}; rename the field')
    return record["text"].encode("utf-8", "surrogatepass")


def _docstrings(content: bytes) -> bytes:
    """Of the module, its classes and functions, a blank line between; nothing for what this Python cannot parse."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return b""
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(filter(None, found)).encode("utf-8", "replace")


def _topics() -> dict[str, str]:
    return importlib.import_module("pydoc_data.topics").topics


def from_files(name: str, licence: str, pattern: str, limit: int = 0) -> Source:
    """The files that match a glob `pattern`, `**` included; of .jsonl files every line is a document.

    limit: documents at most, spread evenly over the names; 0 for all. Raises ValueError when nothing matches.
    """
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if pathlib.Path(path).is_file())
    if not paths:
        raise ValueError(f"source {name!r}: wanted files that match {pattern!r}, got none; quote the pattern for **")
    items = [item for path in paths for item in _items_of(name, pathlib.Path(path))]
    return Source(name, licence, spread(items, limit))


def _items_of(source: str, path: pathlib.Path) -> Iterable[Item]:
    if path.suffix != ".jsonl":
        yield Item(source, str(path), Form.FILE, str(path), 0, path.stat().st_size)
        return
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Item(source, f"{path}:{number}", Form.LINE, str(path), start, len(line))
            start += len(line)


def standard_library(kind: str, split: str = "train", limit: int = 0) -> Source:
    """Source code or documentation (see `text.KINDS`) of this Python; a hash of the name decides on the split."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    items = []
    for name in (source.name for source in text.sources(kind, split)):
        if name.startswith("topics/"):
            topic = name.removeprefix("topics/")
            items.append(Item(kind, name, Form.TOPIC, topic, 0, len(_topics()[topic].encode())))
        else:
            form = Form.FILE if kind == "code" else Form.DOCSTRINGS
            items.append(Item(kind, name, form, str(library / name), 0, (library / name).stat().st_size))
    return Source(kind, PYTHON_LICENCE, spread(items, limit))


def manual_pages(folder: str = "/usr/share/man", limit: int = 0) -> Source | None:
    """The manual pages installed on this machine in all languages; None where there are none."""
    top = pathlib.Path(folder)
    paths = sorted(path for path in top.rglob("man[1-9]*/*.gz") if path.is_file() and not path.is_symlink())
    items = [
        Item("manuals", path.relative_to(top).as_posix(), Form.MANUAL, str(path), 0, path.stat().st_size)
        for path in paths
    ]
    return Source("manuals", MANUAL_LICENCE, spread(items, limit)) if items else None


def spread(items: Sequence[Item], limit: int) -> tuple[Item, ...]:
    """At most `limit` of `items`, evenly over their order; 0 for all."""
    if not limit or len(items) <= limit:
        return tuple(items)
    return tuple(items[i * len(items) // limit] for i in range(limit))
