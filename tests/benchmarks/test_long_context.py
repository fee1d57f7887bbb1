"""A long forward pass takes memory in proportion to its length; and the benchmark that shows it can say no."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import long_context
from llama4_jax.config import presets
from llama4_jax.model import Llama4


def temporary_bytes(length: int) -> int:
    """Scratch memory of the nano model's forward pass, by the compiler's own count; nothing is run."""
    config = dataclasses.replace(presets.nano(), vision=None, patch_token=None)
    model = jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(lambda model, tokens: model.hidden(tokens).hidden).lower(model, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_forward_pass_at_32k_tokens_makes_no_square_array():
    short, long = temporary_bytes(8192), temporary_bytes(32_768)
    assert long <= 4.4 * short
    assert long <= 0.1 * 4 * 32_768**2


def test_growth_is_counted_from_the_short_row_and_measured_in_squares():
    (record,) = long_context.figures({1024: 400, 2048: 400 + 2**22})
    assert record == {"tokens": 2048, "peak": 400 + 2**22, "growth": 2**22, "square": 2**24, "ratio": 0.25}


@pytest.mark.parametrize(
    ("growth", "met"),
    [
        ({8192: 70, 16_384: 150, 32_768: 310}, True),
        ({8192: 70, 16_384: 280, 32_768: 420}, False),
        ({32_768: 500}, False),
    ],
    ids=["linear", "square", "large"],
)
def test_the_verdict_wants_linear_growth_and_little_of_it(growth, met):
    peaks = {1024: 0} | {length: megabytes * 10**6 for length, megabytes in growth.items()}
    assert long_context.verdict(long_context.figures(peaks)) is met
