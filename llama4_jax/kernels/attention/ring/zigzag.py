"""Which tokens each device of a ring should hold, so that all have the same work, and how much each has.

In causal attention the last of n contiguous pieces meets every key and the first only its own. Cut into 2n pieces,
device i takes pieces i and 2n - 1 - i: one early and one late, and the same number of visible pairs for all.

Source: the zig-zag order of zhuzilin/ring-flash-attention; balanced causal rings also in Brandon et al. 2023, "Striped
Attention".
"""

from __future__ import annotations

import jax
import numpy as np

from llama4_jax.kernels.attention import blocks
from llama4_jax.kernels.attention.blocks import Blocking, Tokens


def order(length: int, devices: int) -> np.ndarray:
    """The permutation p [t] after which contiguous shards balance: token p[i] of the sequence goes to place i.

    `array[:, p]` is put in order and `array[:, np.argsort(p)]` takes it back. Raises ValueError for a length that
    2 * devices does not divide.
    """
    return np.arange(length).reshape(-1, piece_length(length, devices))[pieces(devices)].ravel()


def pieces(devices: int) -> np.ndarray:
    """The piece of the sequence in each place, [2 devices]: 0, 2n - 1, 1, 2n - 2, ..."""
    early = np.arange(devices)
    return np.stack([early, 2 * devices - 1 - early], axis=1).ravel()


def piece_length(length: int, devices: int) -> int:
    """Tokens of one of 2 * devices equal pieces; raises ValueError where there are none."""
    if length % (2 * devices):
        raise ValueError(
            f"length={length} does not cut into 2 * {devices} equal pieces; pad it to "
            f"{-(-length // (2 * devices)) * 2 * devices} tokens of segment 0"
        )
    return length // (2 * devices)


def work(positions: jax.Array, segments: jax.Array, devices: int, blocking: Blocking) -> np.ndarray:
    """Pairs of query and key blocks that each device of a ring computes for tokens [b t] in their places: int [devices].

    It is what `portable` and `blockwise` visit, and so their time, to a block.
    """
    spread = Tokens(*(np.stack(np.split(np.asarray(x), devices, axis=1)) for x in (positions, segments)))  # [n b t]

    def met(own: Tokens, other: Tokens) -> jax.Array:
        return blocks.visited(own, other, blocking).sum()

    return np.asarray(jax.vmap(lambda own: jax.vmap(lambda other: met(own, other))(spread).sum())(spread))
