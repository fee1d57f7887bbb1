"""Arrays in large pages: the kernel's own account of a process's memory says where they are."""

import mmap
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels.few_rows import large_pages

SMAPS = pathlib.Path("/proc/self/smaps")


def in_large_pages(address: int) -> int:
    """Bytes in large pages of the stretch of memory that holds `address`."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return int(rest.split()[0]) * 1024
    raise AssertionError(f"no stretch of memory holds {address:#x}")


@pytest.fixture
def kernel_can():
    """Skips where Linux moves nothing into large pages: before 6.1, and where it was built without them."""
    held = mmap.mmap(-1, 3 * large_pages.SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(bytes(len(held)))
    try:
        held.madvise(large_pages._COLLAPSE)
    except OSError as error:
        pytest.skip(f"this kernel moves no memory into large pages: {error}")


def test_an_array_moves_as_far_as_it_fills_large_pages_and_stays_what_it_was(kernel_can):
    values = np.random.default_rng(0).standard_normal((4, 1 << 20), np.float32)
    array = jnp.asarray(values) + 0  # memory of its own
    address = array.unsafe_buffer_pointer()
    moved = large_pages.use(array)
    assert values.nbytes - 2 * large_pages.SIZE < moved <= values.nbytes
    assert in_large_pages(address + large_pages.SIZE) >= moved
    assert array.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(array, values)


def test_what_fills_no_large_page_stays_where_it_is():
    assert large_pages.use(jnp.arange(large_pages.SIZE // 4 - 1, dtype=jnp.int32)) == 0
