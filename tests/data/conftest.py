"""A small data set and a tokenizer for it, shared by the data tests."""

import pathlib

import pytest

from llama4_jax import tokenizer
from llama4_jax.config.data import DataConfig
from llama4_jax.data import loader


@pytest.fixture(scope="session")
def config() -> DataConfig:
    return DataConfig(
        seed=3,
        rows=3,
        sequence_length=96,
        images_per_batch=5,
        image_size=16,
        tokens_per_tile=4,
        num_emoji=12,
        languages=("en", "de", "ru"),
        names_per_image=2,
        heldout_pairs=0.1,
        min_text=8,
        prefetch=0,
    )


@pytest.fixture(scope="session")
def vocabulary(config, tmp_path_factory) -> pathlib.Path:
    """The file of the tokenizer `tok`."""
    path = tmp_path_factory.mktemp("data") / "tokenizer.model"
    tokenizer.train(loader.tokenizer_texts(config, text_bytes=40_000), 500, path)
    return path


@pytest.fixture(scope="session")
def tok(vocabulary) -> tokenizer.Tokenizer:
    return tokenizer.load(vocabulary)
