"""Imports flow one way, and importing costs nothing: no JAX for the configuration, no device, no foreign framework."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A package may import its own level and those before it; cycles inside a level are refused separately.
LEVELS = (
    {"config", "core"},
    {"tokenizer", "kernels"},
    {"nn"},
    {"model"},
    {"quant", "checkpoint", "data", "infer"},
    {"train", "eval", "serve", "plan"},
    {"testing"},
)
LEVEL = {package: i for i, level in enumerate(LEVELS) for package in level}
MODEL_CODE = {"core", "kernels", "nn", "model", "quant", "checkpoint", "infer", "train", "eval", "serve", "plan"}
# Packages that may import model code never from these.
FREE_OF_MODEL_CODE = {"config", "tokenizer", "data"}
TOP_LAYERS = {"train", "eval", "serve", "plan", "testing"}
HEAVY = ("torch", "tensorflow", "transformers")
# tensorflow-text costs 5 s and 760 MB: one file names it, one builds on that, and the program that prepares text loads
# both when a worker sets to work.
NAMES_TENSORFLOW = "llama4_jax.data.preparation.normalise"
MAY_BE_HEAVY = {NAMES_TENSORFLOW, "llama4_jax.data.preparation.annotate"}
LOADS_IT_AT_WORK = "llama4_jax.data.preparation.prepare"


def package_edges(library):
    """(file, its package, package it imports) for every import inside the library."""
    for source in library:
        if len(source.parts) < 2 or source.parts[1] == "__init__":
            continue
        for name in source.imports():
            parts = name.split(".")
            if parts[0] == "llama4_jax" and len(parts) > 1 and parts[1] != source.parts[1]:
                yield source.name, source.parts[1], parts[1]


def test_every_package_has_a_level(library):
    packages = {source.parts[1] for source in library} - {"__init__"}
    assert packages <= LEVEL.keys(), f"give {packages - LEVEL.keys()} a place in LEVELS and in the design"


def test_imports_point_downwards(library):
    upward = [edge for edge in package_edges(library) if LEVEL.get(edge[2], -1) > LEVEL[edge[1]]]
    assert not upward, "lower layers import higher ones: " + "; ".join(f"{f}: {a} -> {b}" for f, a, b in upward)


def test_packages_import_each_other_without_cycles(library):
    edges: dict[str, set[str]] = {}
    for _, importer, imported in package_edges(library):
        edges.setdefault(importer, set()).add(imported)

    def visit(package, path):
        assert package not in path, f"import cycle: {' -> '.join((*path, package))}"
        for following in edges.get(package, ()):
            visit(following, (*path, package))

    for package in list(edges):
        visit(package, ())


def test_tokenizer_data_and_config_import_no_model_code(library):
    wrong = [edge for edge in package_edges(library) if edge[1] in FREE_OF_MODEL_CODE and edge[2] in MODEL_CODE]
    assert not wrong, wrong


def test_testing_uses_nothing_from_train_upwards(library):
    wrong = [edge for edge in package_edges(library) if edge[1] == "testing" and edge[2] in TOP_LAYERS]
    assert not wrong, wrong


def test_nothing_but_tests_imports_testing(library):
    wrong = [edge for edge in package_edges(library) if edge[2] == "testing"]
    assert not wrong, wrong


def test_library_imports_neither_experiments_nor_launch_nor_benchmarks(library):
    wrong = [
        (source.name, name)
        for source in library
        for name in source.imports()
        if name.split(".")[0] in ("experiments", "launch", "benchmarks", "tests")
    ]
    assert not wrong, wrong


def test_launch_starts_experiments_by_name_only(sources):
    wrong = [
        (source.name, name)
        for source in sources
        if source.parts[0] == "launch"
        for name in source.imports()
        if name.split(".")[0] in ("experiments", "llama4_jax")
    ]
    assert not wrong, wrong


def test_experiments_do_not_import_each_other(experiments):
    names = {source.parts[-1] for source in experiments}
    wrong = [
        (source.name, imported)
        for source in experiments
        for imported in source.imports()
        if imported.split(".")[0] == "experiments" and imported.split(".")[1] in names
    ]
    assert not wrong, wrong


def test_torch_and_transformers_are_named_nowhere_in_the_library(library):
    wrong = [
        (source.name, name)
        for source in library
        for name in source.imports()
        if name.split(".")[0] in ("torch", "transformers")
    ]
    assert not wrong, wrong


def test_tensorflow_is_named_in_one_file(sources):
    naming = {
        ".".join(source.parts)
        for source in sources
        for name in source.imports()
        if name.split(".")[0] in ("tensorflow", "tensorflow_text")
    }
    assert naming == {NAMES_TENSORFLOW}


def test_only_the_preparation_of_text_comes_near_tensorflow(library, experiments):
    importing = {
        ".".join(source.parts)
        for source in [*library, *experiments]
        for name in source.imports()
        if name.startswith(tuple(MAY_BE_HEAVY))
    }
    assert importing == {"llama4_jax.data.preparation.annotate", LOADS_IT_AT_WORK}


def python(code: str, root, **environment) -> str:
    """Runs `code` in a fresh interpreter from the project's top and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["llama4_jax", "llama4_jax.config", "llama4_jax.tokenizer"])
def test_importing_does_not_load_jax(root, module):
    found = python(f"import sys, {module}; print([n for n in ('jax', 'flax', 'numpy') if n in sys.modules])", root)
    expected = ("[]",) if module != "llama4_jax.tokenizer" else ("[]", "['numpy']")
    assert found in expected, f"import {module} loads {found}"


def test_importing_any_module_touches_no_device_and_no_other_framework(root, library):
    modules = [
        ".".join(source.parts).removesuffix(".__init__")
        for source in library
        if source.parts[-1] != "__main__" and ".".join(source.parts) not in MAY_BE_HEAVY
    ]
    # With a platform that does not exist, the first touch of a device raises: a public way to see it happen.
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    heavy = [n for n in {HEAVY!r} if n in sys.modules]
    assert not heavy, f"import {{name}} loads {{heavy}}"
import jax
try:
    jax.devices()
except RuntimeError as error:
    print("no device")
"""
    assert python(code, root, JAX_PLATFORMS="no_such_platform") == "no device"
