"""A small model that was trained on real text (`make_trained.py`), and text, for the tests of what rounding does to it."""

from __future__ import annotations

import dataclasses

import make_trained
import numpy as np
import pytest

from llama4_jax import checkpoint
from llama4_jax import tokenizer as tokenizers
from llama4_jax.data import loader
from llama4_jax.model import Llama4


@dataclasses.dataclass(frozen=True)
class Trained:
    """A float32 model, batches of text to calibrate it on, and batches that it has not seen."""

    model: Llama4
    text: list[dict[str, np.ndarray]]
    unseen: list[dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def trained() -> Trained:
    tokenizer = tokenizers.load(make_trained.FOLDER / "tokenizer.model")
    text, unseen = (loader.make(make_trained.DATA, tokenizer, split) for split in ("train", "heldout"))
    model = checkpoint.load_hf(make_trained.FOLDER, dtype="float32")
    return Trained(model, [next(text) for _ in range(4)], [next(unseen) for _ in range(2)])
