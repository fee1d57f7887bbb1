"""What must hold of the model whatever its weights: causality, chunk locality, indifference to the order of experts, and
the same logits however a text is cut into calls."""

import dataclasses
import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax import checkpoint
from llama4_jax.checkpoint import hf
from llama4_jax.config import Llama4Config, presets
from llama4_jax.testing import goldens

TIME, CHUNK = 24, 7
TOLERANCE = 1e-4  # fp32, logits up to 20; a token that leaks through a mask moves them by 1e-2 or more
EVIDENT = 1e-2
SETTINGS = settings(max_examples=20, derandomize=True, deadline=None)

tokens_of_rows = st.integers(0, 10_000).map(
    lambda seed: np.random.RandomState(seed).randint(0, CONFIG.text.vocab_size, (2, TIME)).astype(np.int32)
)


def text_config(nope_interval: int) -> Llama4Config:
    text = presets.tiny().text
    attention = dataclasses.replace(text.attention, chunk_size=CHUNK, nope_interval=nope_interval)
    return Llama4Config(text=dataclasses.replace(text, attention=attention, num_layers=5))


CONFIG, CHUNKED_ONLY = text_config(nope_interval=2), text_config(nope_interval=0)


@functools.cache
def weights_of(config: Llama4Config) -> dict[str, np.ndarray]:
    return goldens.draw_all(hf.tensor_shapes(config), seed=1)


@functools.cache
def model_of(config: Llama4Config):
    return checkpoint.from_tensors(config, weights_of(config))


@jax.jit
def run(model, tokens, segments, cache):
    output = model(tokens, segments=segments, cache=cache)
    return output.logits, output.cache


def logits_of(model, tokens) -> np.ndarray:
    return np.asarray(run(model, tokens, np.ones_like(tokens), None)[0])


def change(tokens: np.ndarray, at: int) -> np.ndarray:
    """Both rows with another token at column `at`."""
    changed = tokens.copy()
    changed[:, at] = (changed[:, at] + 1) % CONFIG.text.vocab_size
    return changed


@SETTINGS
@given(tokens_of_rows, st.integers(0, TIME - 1))
def test_a_token_changes_its_own_and_later_logits_only(tokens, at):
    model = model_of(CONFIG)
    moved = np.abs(logits_of(model, change(tokens, at)) - logits_of(model, tokens)).max(axis=(0, 2))
    assert moved[:at].max(initial=0) < TOLERANCE
    assert moved[at] > EVIDENT


@SETTINGS
@given(tokens_of_rows, st.integers(0, TIME - 1))
def test_without_global_layers_a_token_changes_its_own_chunk_only(tokens, at):
    model = model_of(CHUNKED_ONLY)
    moved = np.abs(logits_of(model, change(tokens, at)) - logits_of(model, tokens)).max(axis=(0, 2))
    end = (at // CHUNK + 1) * CHUNK
    assert moved[at:end].min(initial=np.inf) > 0
    assert moved[at] > EVIDENT
    assert moved[end:].max(initial=0) < TOLERANCE


@settings(SETTINGS, max_examples=5)
@given(tokens_of_rows, st.permutations(range(CONFIG.text.moe.num_experts)))
def test_the_order_of_experts_changes_nothing(tokens, order):
    def permute(name: str, weight: np.ndarray) -> np.ndarray:
        return weight[np.array(order)] if ".router." in name or ".experts." in name else weight

    permuted = {name: permute(name, weight) for name, weight in weights_of(CONFIG).items()}
    got = logits_of(checkpoint.from_tensors(CONFIG, permuted), tokens)
    np.testing.assert_allclose(got, logits_of(model_of(CONFIG), tokens), rtol=0, atol=TOLERANCE)


@settings(SETTINGS, max_examples=10)
@given(tokens_of_rows, *[st.lists(st.integers(1, TIME - 1), max_size=4, unique=True)] * 2)
def test_any_cutting_into_cached_calls_equals_one_pass(tokens, first, second):
    """Each row is cut at its own places, so that rows stand at different positions; parts are padded on the left."""
    model = model_of(CONFIG)
    cuts = [[0, *sorted(row), TIME] for row in (first, second)]
    calls = max(map(len, cuts))
    cuts = [row + [TIME] * (calls - len(row)) for row in cuts]  # a row that is done gets padding only
    cache, got = model.init_cache(2, TIME), np.zeros((2, TIME, CONFIG.text.vocab_size))
    for ends in zip(*(zip(row, row[1:]) for row in cuts)):
        part, segments = np.zeros((2, 2, TIME), np.int32)
        for row, (start, end) in enumerate(ends):
            part[row, TIME - (end - start) :] = tokens[row, start:end]
            segments[row, TIME - (end - start) :] = 1
        logits, cache = run(model, part, segments, cache)
        for row, (start, end) in enumerate(ends):
            got[row, start:end] = np.asarray(logits)[row, TIME - (end - start) :]
    np.testing.assert_allclose(got, logits_of(model, tokens), rtol=0, atol=TOLERANCE)
