"""The Python modules of installed packages, and the mathematics in their documentation.

Docstrings of numerical libraries hold formulas in LaTeX, displayed (`.. math::`) and in the line (:math:`x^2`).
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_INLINE = re.compile(r":math:`([^`]+)`")
_OPTION = re.compile(r"^ *:\w+:.*\n?", re.MULTILINE)  # of a directive, as ":label: norm"
_DISPLAYED = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +.*|\n[ ]*)*)", re.MULTILINE)


class Module(NamedTuple):
    """A source file: its name from the package on, as "scipy/linalg/_basic.py", and its text."""

    name: str
    code: str


def read(packages: Iterable[str]) -> Iterator[Module]:
    """The modules of `packages`, by name within each. Raises ValueError for a package that is not installed."""
    for package in packages:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"no package {package!r} is installed; pip install it, or leave it out")
        folder = pathlib.Path(next(iter(found.submodule_search_locations)))
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            yield Module(name, path.read_text(encoding="utf-8", errors="replace"))


def mathematics(module: Module) -> list[str]:
    """The docstrings of a module that have a formula, each with the words and examples around it."""
    if "math:" not in module.code:
        return []
    nodes = (node for node in ast.walk(ast.parse(module.code)) if isinstance(node, _DOCUMENTED))
    return [docstring for docstring in filter(None, map(ast.get_docstring, nodes)) if formulas(docstring)]


def formulas(docstring: str) -> list[str]:
    """The LaTeX in a docstring: displayed formulas, then those in the line."""
    displayed = [textwrap.dedent(_OPTION.sub("", found[2])).strip() for found in _DISPLAYED.finditer(docstring)]
    return [formula for formula in (*displayed, *_INLINE.findall(docstring)) if formula]
