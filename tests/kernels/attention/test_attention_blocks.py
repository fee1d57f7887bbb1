"""Which pairs of blocks are computed: counts for real lengths, and proof that the others are not read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from llama4_jax.kernels.attention import blocks, blockwise, mask, workloads
from llama4_jax.kernels.attention.blocks import Blocking, Tokens


def row(documents, padding=0, empty=0):
    """Tokens of one row [1 t]: left padding, documents one after the other, empty slots."""
    positions = np.concatenate([np.zeros(padding), *map(np.arange, documents), np.full(empty, -1)])
    segments = np.repeat(np.arange(len(documents) + 2), [padding, *documents, empty])
    return Tokens(jnp.array([positions], jnp.int32), jnp.array([segments], jnp.int32))


def count(queries, keys, size, chunk_size):
    return int(blocks.visited(queries, keys, Blocking(queries=size, keys=size, chunk_size=chunk_size)).sum())


def test_causal_layer_visits_half_of_all_pairs():
    tokens = row([32_768])
    assert count(tokens, tokens, 128, None) == 256 * 257 // 2


def test_chunked_layer_visits_the_triangle_of_each_chunk():
    tokens = row([32_768])
    assert count(tokens, tokens, 128, 8192) == 4 * (64 * 65 // 2)
    assert count(tokens, tokens, 64, 64) == 512  # one pair a block: t * chunk_size scores


def test_documents_packed_in_a_row_do_not_visit_each_other():
    tokens = row([8192, 8192])
    assert count(tokens, tokens, 128, None) == 2 * (64 * 65 // 2)
    assert count(tokens, tokens, 128, 4096) == 4 * (32 * 33 // 2)


@pytest.mark.parametrize("platform, size", [("cpu", 64), ("gpu", 512), ("tpu", 512)])
def test_blocks_fit_a_cpu_s_cache_or_fill_an_accelerator_s_matrix_units(platform, size):
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        assert blocks.choose(40, 8192, 8192, None) == Blocking(queries=size, keys=size, chunk_size=None)
        assert blocks.choose(40, 8192, 8192, 32).queries == 32  # no larger than the chunk


def test_padding_and_empty_slots_are_not_visited():
    tokens = row([1024], padding=2048, empty=1024)
    assert count(tokens, tokens, 128, None) == 8 * 9 // 2


def test_decoding_visits_the_filled_part_of_a_cache():
    cache, query = row([1000], empty=31_768), Tokens(jnp.array([[999]]), jnp.array([[1]]))
    table = blocks.visited(query, cache, Blocking(queries=1, keys=128, chunk_size=None))
    assert table.shape == (1, 256) and table.sum() == 8
    table = blocks.visited(query, cache, Blocking(queries=1, keys=128, chunk_size=256))
    np.testing.assert_array_equal(np.flatnonzero(table), [6, 7])  # positions 768 to 999


def test_chunks_off_the_block_grid_cost_one_block_more():
    tokens = row([4096], padding=37)
    # Each of 8 chunks touches 9 blocks of 64; a block on a border is one of both its chunks.
    assert count(tokens, tokens, 64, 512) == 8 * (9 * 10 // 2) - 7


@functools.partial(jax.jit, static_argnames="blocking")
def _visited_and_needed(queries, keys, blocking):
    seen = mask.visible(queries.positions, keys.positions, queries.segments, keys.segments, blocking.chunk_size)
    tiled = seen.reshape(seen.shape[0], -1, blocking.queries, seen.shape[2] // blocking.keys, blocking.keys)
    return blocks.visited(queries, keys, blocking), tiled.any((0, 2, 4))


_TOKENS = st.lists(st.tuples(st.integers(-1, 12), st.integers(0, 2)), min_size=48, max_size=48)


@settings(max_examples=60, deadline=None)
@given(queries=_TOKENS, keys=_TOKENS, chunk_size=st.sampled_from([None, 1, 5]))
def test_no_visible_pair_is_ever_skipped(queries, keys, chunk_size):
    queries, keys = (Tokens(*jnp.array(x, jnp.int32).reshape(2, 24, 2).transpose(2, 0, 1)) for x in (queries, keys))
    visited, needed = _visited_and_needed(queries, keys, Blocking(queries=4, keys=6, chunk_size=chunk_size))
    assert not (np.asarray(needed) & ~np.asarray(visited)).any()


def test_blocks_that_are_not_listed_are_never_read():
    workload = workloads.Workload(
        batch=1, query_length=64, key_length=64, heads=2, kv_heads=1, head_dim=8, chunk_size=16
    )
    arrays, tokens = workload.arrays(), workload.tokens()
    blocking = Blocking(queries=8, keys=8, chunk_size=16)

    def loss(arrays, first_query):
        # Queries before the last chunk become padding, so that chunk's keys alone are listed.
        segments = jnp.where(jnp.arange(64) < first_query, 0, 1)[None]
        moved = tokens | {"query_segments": segments}
        return blockwise.attend(**arrays, **moved, chunk_size=16, blocking=blocking).sum()

    poisoned = arrays | {k: arrays[k].at[:, :48].set(jnp.nan) for k in ("key", "value")}
    step = jax.jit(jax.value_and_grad(loss))
    value, gradients = step(poisoned, 48)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in gradients.values())
    assert value == step(arrays, 48)[0]
    assert np.isnan(step(poisoned, 47)[0])  # the poison works: one query in the chunk before reads it


@pytest.mark.parametrize("rows", [1, 8, 64, 4096])
@pytest.mark.parametrize("lengths", [(1, 32_768), (1, 1), (5, 40), (150, 150), (4096, 4096), (100, 8192)])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 64, 8192])
def test_chosen_blocks_fit_lengths_chunk_and_cache(rows, lengths, chunk_size):
    blocking = blocks.choose(rows, *lengths, chunk_size)
    for size, length in zip((blocking.queries, blocking.keys), lengths):
        filled = -(-length // size) * size
        assert 1 <= size and filled - length < max(size, 8)
        if chunk_size is not None:
            assert size <= max(2 * chunk_size, blocks.SMALLEST)
    tile = rows * blocking.queries * blocking.keys
    assert tile <= max(blocks.TILE_SCORES, rows * blocks.SMALLEST**2)
