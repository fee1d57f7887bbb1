"""Properties that hold for any positions, segments and chunks: causality, chunk locality, equal implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.kernels.attention import blockwise, mask, reference
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.testing import budget

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, HEAD_DIM = 2, 21, 29, 4, 2, 4
SHAPES = [(BATCH, QUERIES, KEYS, HEADS, KV_HEADS), (1, 40, 17, 5, 1), (3, 9, 64, 3, 3)]  # b t s n k


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def attend(implementation, query, key, value, tokens, chunk_size):
    if implementation == "reference":
        return reference.attend(query, key, value, **tokens, chunk_size=chunk_size)
    blocking = Blocking(queries=8, keys=8, chunk_size=chunk_size)
    return blockwise.attend(query, key, value, **tokens, chunk_size=chunk_size, blocking=blocking)


@st.composite
def calls(draw, shapes=(SHAPES[0],)):
    """Arrays and tokens of a call: any positions (empty slots included), any segments (padding included)."""
    batch, queries, keys, heads, kv_heads = draw(st.sampled_from(shapes))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    segments = draw(st.integers(1, 3))
    furthest = draw(st.sampled_from([3, 30]))
    tokens = {
        "query_positions": random.integers(0, furthest, (batch, queries)),
        "key_positions": random.integers(-1, furthest, (batch, keys)),
        "query_segments": random.integers(0, segments + 1, (batch, queries)),
        "key_segments": random.integers(0, segments + 1, (batch, keys)),
    }
    if draw(st.booleans()):  # in order, as in a row that is not a cache
        tokens = {k: np.sort(v, axis=1) for k, v in tokens.items()}
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    arrays = [random.standard_normal((batch, n, h, HEAD_DIM)).astype(np.float32) for n, h in shapes]
    return arrays, {k: jnp.asarray(v, jnp.int32) for k, v in tokens.items()}


def visible(tokens, chunk_size):
    return np.asarray(mask.visible(*tokens.values(), chunk_size))


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@settings(max_examples=20, deadline=None)
@given(call=calls(), chunk_size=st.sampled_from([None, 4]), now=st.integers(0, 29))
def test_changing_later_keys_changes_nothing(implementation, call, chunk_size, now):
    (query, key, value), tokens = call
    later = np.asarray(tokens["key_positions"] > now)[..., None, None]
    before = attend(implementation, query, key, value, tokens, chunk_size)
    after = attend(
        implementation, query, np.where(later, 7 * key, key), np.where(later, -value, value), tokens, chunk_size
    )
    early = np.asarray(tokens["query_positions"] <= now)
    np.testing.assert_array_equal(before[early], after[early])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@settings(max_examples=20, deadline=None)
@given(call=calls(), chunk=st.integers(0, 7), segment=st.integers(1, 3))
def test_only_keys_of_the_same_chunk_and_segment_matter(implementation, call, chunk, segment):
    (query, key, value), tokens = call
    same = (tokens["key_positions"] // 4 == chunk) & (tokens["key_segments"] == segment)
    other = ~np.asarray(same)[..., None, None]
    before = attend(implementation, query, key, value, tokens, 4)
    after = attend(implementation, query, np.where(other, 7 * key, key), np.where(other, -value, value), tokens, 4)
    asked = np.asarray((tokens["query_positions"] // 4 == chunk) & (tokens["query_segments"] == segment))
    np.testing.assert_array_equal(before[asked], after[asked])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@settings(max_examples=20, deadline=None)
@given(call=calls(), chunk_size=st.sampled_from([None, 4]), slot=st.integers(0, KEYS - 1))
def test_changing_a_value_changes_exactly_the_queries_that_see_it(implementation, call, chunk_size, slot):
    (query, key, value), tokens = call
    changed = value.copy()
    changed[:, slot] += 100.0
    difference = attend(implementation, query, key, changed, tokens, chunk_size)
    difference -= attend(implementation, query, key, value, tokens, chunk_size)
    touched = np.asarray(difference != 0).any((-1, -2))  # [b t]
    np.testing.assert_array_equal(touched, visible(tokens, chunk_size)[..., slot])


@settings(max_examples=50, deadline=None)
@given(call=calls(SHAPES), chunk_size=st.sampled_from([None, 4]))
def test_blockwise_equals_reference_for_any_tokens(call, chunk_size):
    (query, key, value), tokens = call
    got, wanted = (attend(name, query, key, value, tokens, chunk_size) for name in ("blockwise", "reference"))
    seen = visible(tokens, chunk_size)
    allowed = budget.attention(jnp.float32, query, key, value, cotangent=query, visible=seen)
    assert (np.abs(np.asarray(got) - np.asarray(wanted)) <= 2 * allowed.output).all()
