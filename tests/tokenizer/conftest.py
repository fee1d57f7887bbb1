"""The tokenizers that the tests of this folder share."""

import importlib.util
import pathlib

import pytest

from llama4_jax import tokenizer

TEXTS = [
    "def add(left, right):\n    return left + right  # the sum\n" * 20,
    "The quick brown fox isn't lazy; it's jumping over 12345 dogs. " * 20,
    "Быстрая лиса прыгает через собаку. Älteres Gemüse, señor. 赤リンゴ りんご " * 20,
]


@pytest.fixture(scope="session")
def texts():
    """What `tok` was trained on."""
    return TEXTS


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    """A tokenizer of 400 ids trained here, with the special tokens that this project uses and no others."""
    return tokenizer.train(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def llama4():
    """The published vocabulary, from the wheel `llama-models` (pip install llama-models)."""
    found = importlib.util.find_spec("llama_models")
    if found is None:
        pytest.skip("the wheel llama-models, which ships the published vocabulary, is not installed")
    return tokenizer.load(pathlib.Path(found.origin).parent / "llama4" / "tokenizer.model")
