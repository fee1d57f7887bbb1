"""Small integers side by side: by hand, and there and back at every length around a byte and a word."""

import numpy as np
import pytest

from llama4_jax.checkpoint import packing

INTEGERS = {4: packing.INT4, 8: np.dtype(np.int8)}


def drawn(bits: int, *shape: int) -> np.ndarray:
    half = 1 << (bits - 1)
    return np.random.default_rng(0).integers(-half, half, shape).astype(np.int8).astype(INTEGERS[bits])


def test_pairs_lie_low_half_first_in_twos_complement():
    values = np.array([[1, -1, 7], [-8, 2, 0]], np.int8).astype(packing.INT4)
    np.testing.assert_array_equal(packing.pack_pairs(values), [[0xF1, 0x07], [0x28, 0x00]])


def test_words_count_from_the_least_number():
    four = np.array([[-8, -7, 0, 7, 0, 0, 0, 0, 1]], np.int8).astype(packing.INT4)
    np.testing.assert_array_equal(packing.pack_words(four, 4).view(np.uint32), [[0x8888F810, 0x00000009]])
    eight = np.array([[-128, 127, 0, -1, 1]], np.int8)
    np.testing.assert_array_equal(packing.pack_words(eight, 8).view(np.uint32), [[0x7F80FF00, 0x00000081]])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 16])
def test_what_is_packed_unpacks_to_the_same_numbers(size):
    values = drawn(4, 2, 3, size)
    assert packing.pack_pairs(values).shape == (2, 3, (size + 1) // 2)
    np.testing.assert_array_equal(packing.unpack_pairs(packing.pack_pairs(values), size), values)
    for bits in (4, 8):
        values = drawn(bits, 5, size)
        words = packing.pack_words(values, bits)
        assert words.shape == (5, packing.num_words(size, bits)) and words.dtype == np.int32
        unpacked = packing.unpack_words(words, bits, size)
        assert unpacked.dtype == values.dtype
        np.testing.assert_array_equal(unpacked, values)
