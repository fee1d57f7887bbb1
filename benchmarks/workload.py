"""The work that both sides of `hf_side_by_side` do: the same tokens, the same optimiser, the same clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np

from llama4_jax.config import presets

PREFILL_LENGTH = 1024  # tokens
PROMPT_LENGTH = 128  # tokens, before decoding
DECODE_STEPS = 32
TRAIN_SHAPE = (4, 512)  # sequences, tokens
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
TOKENS = {  # tokens that one repetition of a case handles
    "prefill": PREFILL_LENGTH,
    "decode1": DECODE_STEPS,
    "decode8": 8 * DECODE_STEPS,
    "train": TRAIN_SHAPE[0] * TRAIN_SHAPE[1],
}


def prefill_tokens() -> np.ndarray:
    return _tokens(1, PREFILL_LENGTH)


def prompts(*, batch: int) -> np.ndarray:
    return _tokens(batch, PROMPT_LENGTH)


def train_tokens() -> np.ndarray:
    """[b t+1]: inputs are all but the last column, targets all but the first."""
    return _tokens(TRAIN_SHAPE[0], TRAIN_SHAPE[1] + 1)


def decode_batch(case: str) -> int:
    """The batch size in the name of a decode case: 8 for `decode8`."""
    return int(case.removeprefix("decode"))


def decode_seconds(generate: Callable[[int], float]) -> dict[str, float]:
    """Seconds of DECODE_STEPS steps alone, and of the whole call with the prompt's prefill.

    generate: makes that many new tokens and returns the seconds it took. The first token comes from the prefill, so
    the difference between 1 + DECODE_STEPS tokens and 1 token is the time of the steps. One token is made three times and
    the least counts: a prefill that something held up would make steps faster than they are.
    """
    first = min(generate(1) for _ in range(3))
    whole = generate(1 + DECODE_STEPS)
    return {"seconds": whole - first, "whole": whole}


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Yields a dict that holds `seconds` once the block has ended."""
    timing: dict[str, float] = {}
    started = time.perf_counter()
    yield timing
    timing["seconds"] = time.perf_counter() - started


def _tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, presets.bench_151m().text.vocab_size, shape)  # int64, as torch wants
