"""The project's Python files as syntax trees, read once."""

from __future__ import annotations

import ast
import dataclasses
import pathlib

import pytest

EXPERIMENT_PARTS = {
    "__init__",
    "output",
    "pod",
    "speaking",
}  # files in experiments/ that are no experiment and that experiments import
FOLDERS = ("llama4_jax", "experiments", "benchmarks", "launch", "tests")


@dataclasses.dataclass(frozen=True)
class Source:
    """One file: `name` is its path from the project's top, `parts` the folders and the stem of that path."""

    name: str
    text: str
    tree: ast.Module

    @property
    def parts(self) -> tuple[str, ...]:
        return pathlib.PurePosixPath(self.name).with_suffix("").parts

    def imports(self) -> list[str]:
        """Dotted names of everything imported anywhere in the file, inside functions too."""
        names = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(self.parts[: len(self.parts) - node.level]) if node.level else ""
                module = ".".join(part for part in (package, node.module) if part)
                names += [f"{module}.{alias.name}" for alias in node.names]
        return names

    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    def at(self, node: ast.AST) -> str:
        return f"{self.name}:{node.lineno}"


@pytest.fixture(scope="session")
def sources(root) -> list[Source]:
    """Every Python file of the project, in order of its name."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    texts = [(path.relative_to(root).as_posix(), path.read_text()) for path in paths]
    return [Source(name, text, ast.parse(text, name)) for name, text in texts]


@pytest.fixture(scope="session")
def library(sources) -> list[Source]:
    return [source for source in sources if source.parts[0] == "llama4_jax"]


@pytest.fixture(scope="session")
def experiments(sources) -> list[Source]:
    """Scripts of one claim or job each."""
    found = [source for source in sources if source.parts[0] == "experiments"]
    return [source for source in found if source.parts[-1] not in EXPERIMENT_PARTS]
