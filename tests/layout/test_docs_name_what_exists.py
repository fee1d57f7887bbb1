"""What the documents name exists: tests, files and make targets."""

import re

import pytest

DOCUMENTS = (
    "CONTRIBUTING.md",
    "README.md",
    "docs/checkpoints.md",
    "docs/low_bit.md",
    "docs/low_bit_kernels.md",
    "docs/numerics.md",
    "docs/performance.md",
    "docs/quantisation.md",
    "docs/scaling.md",
    "docs/sharding.md",
)


def text_of(root, document: str) -> str:
    path = root / document
    assert path.is_file(), f"{document} is missing"
    return path.read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_a_document_names_exists(root, sources, document):
    known = {function.name for source in sources if source.parts[0] == "tests" for function in source.functions()}
    named = set(re.findall(r"`(test_\w+)`", text_of(root, document)))
    # CONTRIBUTING shows what a good name is like.
    assert named - known <= {"test_chunked_layer_ignores_previous_chunk"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(root, document):
    named = re.findall(r"`([\w./-]+\.(?:py|md|cfg|toml|yml))(?:: ?\w+)?`", text_of(root, document))
    generic = {"api.py", "reference.py", "workloads.py", "experiments/README.md"}  # what a new kernel's folder holds
    missing = [name for name in named if not ((root / name).exists() or (root / "llama4_jax" / name).exists())]
    assert set(missing) <= generic, missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_that_a_document_names_exists(root, document):
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)", text_of(root, document)))
    assert named <= targets, named - targets


def test_traps_of_the_specification_are_all_there_and_each_says_what_shows_it(root):
    traps = re.split(r"^\*\*([A-P])\. ", text_of(root, "docs/numerics.md"), flags=re.MULTILINE)
    letters, bodies = traps[1::2], traps[2::2]
    assert letters == list("ABCDEFGHIJKLMNOP")
    silent = [letter for letter, body in zip(letters, bodies) if "Shown by" not in body]
    assert not silent
