"""Text that every machine with Python has: the standard library's source code and its documentation.

Code is one document a module; documentation is the docstrings of one module, or one topic of `help()`. The order is that
of the names, and a hash of the name decides between training and held-out, so both are the same on every run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import pathlib
import sysconfig
from collections.abc import Callable
from typing import NamedTuple

KINDS = ("code", "documentation")
SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.05  # of the documents

# Folders that are no part of the library proper: installed packages, test data, generated tables.
_LEFT_OUT = frozenset(
    "site-packages dist-packages test tests idle_test lib2to3 __pycache__ _bundled turtledemo pydoc_data encodings".split()
)


class Source(NamedTuple):
    """A document, read when asked for."""

    name: str
    read: Callable[[], str]


@functools.cache
def sources(kind: str, split: str) -> tuple[Source, ...]:
    """All documents of one of KINDS in one of SPLITS, by name."""
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(f"wanted a kind among {KINDS} and a split among {SPLITS}, got {kind!r} and {split!r}")
    if kind == "code":
        every = [Source(name, functools.partial(_code, path)) for name, path in _modules()]
    else:
        every = [Source(name, functools.partial(_docstrings, path)) for name, path in _modules()] + _topics()
    return tuple(source for source in every if is_held_out(source.name) == (split == "heldout"))


def is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


@functools.cache
def _modules() -> tuple[tuple[str, pathlib.Path], ...]:
    """(name relative to the library, path) of each module, sorted by name."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = ((path.relative_to(library), path) for path in library.rglob("*.py"))
    return tuple(sorted((name.as_posix(), path) for name, path in found if not _LEFT_OUT & set(name.parts)))


def _code(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _docstrings(path: pathlib.Path) -> str:
    """The docstrings of a module, its classes and functions, a blank line between them."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(_code(path))) if isinstance(node, documented))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _topics() -> list[Source]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return [Source(f"topics/{name}", functools.partial(topics.__getitem__, name)) for name in sorted(topics)]
