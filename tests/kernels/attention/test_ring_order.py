"""The zig-zag order gives every device of a ring one early and one late piece, and so the same work."""

import numpy as np
import pytest

from llama4_jax.kernels.attention import ring
from llama4_jax.kernels.attention.blocks import Blocking


def test_each_device_takes_a_piece_from_each_end():
    assert ring.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert sorted(ring.order(48, 4)) == list(range(48))


def test_a_length_that_does_not_cut_evenly_names_the_next_that_does():
    with pytest.raises(ValueError, match="length=50 does not cut into 2 . 4 equal pieces; pad it to 56"):
        ring.order(50, 4)


def work(positions, segments, in_order=None, chunk_size=None):
    places = slice(None) if in_order is None else in_order
    blocking = Blocking(queries=16, keys=16, chunk_size=chunk_size)
    return ring.work(positions[:, places], segments[:, places], 4, blocking)


def test_causal_work_is_even_in_zigzag_order_and_lopsided_without():
    positions, segments = np.arange(512)[None], np.ones((1, 512), int)
    assert work(positions, segments).tolist() == [36, 100, 164, 228]  # of 32 * 33 / 2 = 528 pairs of blocks
    assert work(positions, segments, ring.order(512, 4)).tolist() == [132, 132, 132, 132]


def test_packed_documents_cost_what_they_show():
    positions = np.concatenate([np.arange(256), np.arange(256)])[None]
    segments = np.repeat([[1, 2]], 256, axis=1)
    assert work(positions, segments).tolist() == [36, 100, 36, 100]  # two documents of 16 blocks each
    assert work(positions, segments, ring.order(512, 4)).sum() == 2 * 136
