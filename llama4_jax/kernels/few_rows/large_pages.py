"""Weights in large pages of memory, in which a CPU that reads them from first to last finds its way sooner.

An address takes a look into the tables of memory for each page that is new. 4 KiB are read in less time than that takes where
tables are looked up through those of a virtual machine; 2 MiB are not. Linux moves pages that are in use into large ones when
asked (`MADV_COLLAPSE`, from Linux 6.1): man7.org/linux/man-pages/man2/madvise.2.html.
"""

from __future__ import annotations

import ctypes
import logging
import sys

import jax

SIZE = 2 << 20  # bytes of a large page; where they are larger, as on some Arm machines, the kernel refuses
_COLLAPSE = 25

_logger = logging.getLogger(__name__)


def use(array: jax.Array) -> int:
    """Moves what lies on this CPU of `array` into large pages, as far as it fills them; returns the bytes that moved.

    Values stay as they are, and so do all addresses. Where the kernel cannot, nothing happens: 0.
    """
    if not sys.platform.startswith("linux") or isinstance(array, jax.core.Tracer):
        return 0
    shards = [shard.data for shard in jax.block_until_ready(array).addressable_shards]
    return sum(_collapse(shard.unsafe_buffer_pointer(), shard.on_device_size_in_bytes()) for shard in shards)


def _collapse(address: int, size: int) -> int:
    first, end = -(-address // SIZE) * SIZE, (address + size) // SIZE * SIZE
    if first >= end:
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    if madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _COLLAPSE) == 0:
        return end - first
    _logger.debug("no large pages for %d bytes: error %d", end - first, ctypes.get_errno())
    return 0
