"""Small integers side by side in wider ones: two int4 a byte, eight int4 or four int8 a word of 32 bits.

The first number lies in the lowest bits. Bytes hold two's complement, as our own checkpoints do; words hold numbers that
count from 0, which is the least one.

Source: words as `pack_to_int32` and `unpack_from_int32` of compressed-tensors 0.20 for 4 and 8 bits.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

INT4 = np.dtype(ml_dtypes.int4)
WORD = np.dtype("<i4")


def pack_pairs(values: np.ndarray) -> np.ndarray:
    """int4 [.. n] as bytes [.. ceil(n / 2)]; after an odd n the high half of the last is 0."""
    return _join(_bits(values))


def unpack_pairs(packed: np.ndarray, size: int) -> np.ndarray:
    """The first `size` int4 of each row of bytes; the inverse of `pack_pairs`."""
    return _signed(_halves(packed)[..., :size], 4).astype(INT4)


def pack_words(values: np.ndarray, bits: int) -> np.ndarray:
    """int4 or int8 (bits: 4 or 8) [rows n] as words [rows ceil(n * bits / 32)], the last filled up with 0."""
    counted = _bits(values) ^ 8 if bits == 4 else values.view(np.uint8) ^ 128
    counted = np.pad(counted, ((0, 0), (0, -counted.shape[1] % (32 // bits))))
    return np.ascontiguousarray(_join(counted) if bits == 4 else counted).view(WORD)


def unpack_words(words: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The first `size` numbers of each row of words, in int4 or int8; the inverse of `pack_words`."""
    held = np.ascontiguousarray(words).view(np.uint8)
    counted = _halves(held) if bits == 4 else held
    signed = _signed(counted[:, :size] ^ (1 << (bits - 1)), bits)
    return signed.astype(INT4) if bits == 4 else signed


def num_words(size: int, bits: int) -> int:
    """How many words hold `size` numbers."""
    return -(-size * bits // 32)


def _bits(values: np.ndarray) -> np.ndarray:
    """The four bits of each int4, in a byte."""
    return values.astype(np.int8).view(np.uint8) & 15


def _signed(bits: np.ndarray, number: int) -> np.ndarray:
    """int8 out of the two's complement of so many bits."""
    sign = np.uint8(1 << (number - 1))
    return (bits ^ sign).view(np.int8) - sign.view(np.int8) if number < 8 else bits.view(np.int8)


def _join(halves: np.ndarray) -> np.ndarray:
    """Bytes out of their low and high halves, which take turns along the last axis."""
    low, high = halves[..., 0::2], halves[..., 1::2]
    packed = low.copy()
    packed[..., : high.shape[-1]] |= high << 4
    return packed


def _halves(packed: np.ndarray) -> np.ndarray:
    """Low and high halves of bytes by turns along the last axis; the inverse of `_join`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
