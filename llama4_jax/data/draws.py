"""Random numbers by purpose and place: anything in the endless stream can be drawn again without what came before it."""

from __future__ import annotations

import enum
import functools

import numpy as np


class Draw(enum.IntEnum):
    """What random numbers are for; each purpose has streams of its own."""

    ORDER = 0
    LANGUAGES = 1
    TRAIN_RENDERING = 2
    HELDOUT_RENDERING = 3


def generator(seed: int, draw: Draw, *place: int) -> np.random.Generator:
    """The generator for one purpose at one place, such as (epoch, emoji); places have one length for each purpose."""
    return np.random.default_rng((seed, int(draw), *place))


def shuffled(position: int, length: int, seed: int) -> tuple[int, int]:
    """(epoch, item) at `position` of an endless stream that visits `length` items once an epoch, in new order each."""
    epoch, place = divmod(position, length)
    return epoch, int(_order(length, seed, epoch)[place])


@functools.lru_cache(maxsize=16)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, Draw.ORDER, epoch).permutation(length)
