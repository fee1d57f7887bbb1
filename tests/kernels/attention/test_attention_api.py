"""The front door: choice of implementation, and errors that say what to do."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels.attention import api, workloads


def call(**changes):
    workload = workloads.SMALL["several_chunks"]
    arguments = {**workload.arrays(), **workload.tokens(), "chunk_size": workload.chunk_size}
    return api.attend(**{**arguments, **changes})


def arrays(shape, dtype=jnp.float32):
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def test_few_queries_small_calls_and_large_ones_each_have_their_implementation():
    assert api.choose((1, 128, 8, 64), (1, 128, 2, 64)) == "reference"
    assert api.choose((1, 1024, 8, 64), (1, 1024, 2, 64)) == "blockwise"
    assert api.choose((8, 1, 8, 64), (8, 160, 2, 64)) == "few_queries"
    assert api.choose((8, 4, 8, 64), (8, 131_072, 2, 64)) == "few_queries"
    assert api.choose((8, 5, 8, 64), (8, 131_072, 2, 64)) == "blockwise"
    assert api.choose((1, 5, 8, 64), (1, 160, 2, 64)) == "reference"


def test_choice_is_logged_once_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, logger=api.__name__):
        for _ in range(3):
            api.choose((1, 1777, 8, 64), (1, 1777, 2, 64))
    assert [record.getMessage() for record in caplog.records] == [
        "attention uses blockwise for 8 x 1777 x 1777 (batch and heads, queries, keys): scores are more than 262144"
    ]


@pytest.mark.parametrize("implementation", sorted(api.IMPLEMENTATIONS))
def test_named_implementation_is_the_one_that_runs(implementation):
    workload = workloads.SMALL["several_chunks"]
    named = jax.make_jaxpr(lambda: call(implementation=implementation))()
    assert ("while" in str(named)) == (implementation == "blockwise")
    assert call(implementation=implementation).shape == workload.arrays()["query"].shape


def test_unknown_implementation_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'flash' is unknown; use None or one of \['blockwise', 'few_queries', 'reference'\]"
    ):
        call(implementation="flash")


@pytest.mark.parametrize(
    "changes, message",
    [
        (arrays((2, 50, 3, 8)), r"heads=4 is not divisible by kv_heads=3; use one of \[1, 2, 4\]"),
        (arrays((2, 50, 2, 4)), "differ in batch or head_dim"),
        (arrays((1, 50, 2, 8)), "differ in batch or head_dim"),
        ({"key": jnp.zeros((2, 49, 2, 8))}, "make them alike"),
        (arrays((2, 50, 2, 8), jnp.bfloat16), "cast the one read from the cache"),
        (arrays((50, 2, 8)), "wanted 4 axes"),
        ({"key_positions": np.zeros((2, 49), np.int32)}, r"key_positions has shape \(2, 49\); wanted \(2, 50\)"),
        ({"query_segments": np.zeros((1, 50), np.int32)}, r"query_segments has shape \(1, 50\)"),
        ({"query_positions": jnp.zeros((2, 50))}, "query_positions is float32; wanted int32"),
        ({"chunk_size": 0}, "chunk_size=0; wanted at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_integer_keys_are_a_stated_limit():
    with pytest.raises(NotImplementedError, match="key of dtype int8; cast to bfloat16 or float32 first"):
        call(**arrays((2, 50, 2, 8), jnp.int8))
