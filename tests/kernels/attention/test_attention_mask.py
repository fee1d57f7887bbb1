"""The mask rule, against masks small enough to read."""

import jax.numpy as jnp
import numpy as np

from llama4_jax.kernels.attention import mask


def drawn(positions, segments, chunk_size, query=None):
    """The rule as rows of text: `x` sees, `.` does not. `query` picks some tokens as queries."""
    positions, segments = jnp.array([positions]), jnp.array([segments])
    rows = slice(None) if query is None else jnp.array(query)
    seen = mask.visible(positions[:, rows], positions, segments[:, rows], segments, chunk_size)
    return ["".join("x" if see else "." for see in row) for row in np.asarray(seen[0])]


def test_chunks_are_fixed_blocks_and_not_a_sliding_window():
    assert drawn([0, 1, 2, 3, 4, 5], [1] * 6, chunk_size=3) == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        "...xxx",
    ]


def test_global_layer_sees_everything_before():
    assert drawn([0, 1, 2, 3, 4, 5], [1] * 6, chunk_size=None) == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "xxxxx.",
        "xxxxxx",
    ]


def test_chunks_restart_with_each_packed_document():
    assert drawn([0, 1, 0, 1, 2, 3], [1, 1, 2, 2, 2, 2], chunk_size=3) == [
        "x.....",
        "xx....",
        "..x...",
        "..xx..",
        "..xxx.",
        ".....x",
    ]


def test_left_padding_moves_no_chunk_border():
    assert drawn([0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1], chunk_size=3) == [
        "......",
        "......",
        "..x...",
        "..xx..",
        "..xxx.",
        ".....x",
    ]


def test_empty_slots_and_order_in_a_cache_do_not_matter():
    # A ring of one chunk: positions 3 and 4 have overwritten 0 and 1; the slot of 5 is empty, 2 is of the last chunk.
    assert drawn([3, 4, 2, -1, 4, 3], [1, 1, 1, 1, 2, 2], chunk_size=3, query=[0, 1]) == ["x.....", "xx...."]
    assert drawn([3, 4, 2, -1, 4, 3], [1, 1, 1, 1, 2, 2], chunk_size=None, query=[0, 1]) == ["x.x...", "xxx..."]


def test_rows_of_the_batch_follow_their_own_positions():
    keys = jnp.array([[0, 1, 2], [0, 1, 2]])
    ones = jnp.ones_like(keys)
    seen = mask.visible(jnp.array([[0], [2]]), keys, ones[:, :1], ones, None)
    np.testing.assert_array_equal(seen, [[[True, False, False]], [[True, True, True]]])
