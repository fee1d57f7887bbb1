"""Sizes of the TPU kernels' blocks: a table for each chip, kind of product and number of rows, and what fits a chip's memory.

`python -m benchmarks.int4_blocks` makes the table, by the compiler's schedules; its figures are estimates, not measured.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax

from llama4_jax.kernels.int4_matmul.operands import Operands

_logger = logging.getLogger(__name__)

CHIPS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}  # by JAX's device_kind
INT8 = ("v5e", "v5p", "v6e")  # have matrix units for int8
VMEM = 32 * 2**20  # bytes of blocks, of which there are two each, to stay below
LANES = 128


class Block(NamedTuple):
    """Rows and columns of the output that a step of the grid makes."""

    rows: int
    columns: int


ROWS = 256  # of a block, at most
FEW_ROWS = 64
# Columns of a block for few rows and for more, by chip and kind: bits of weights and of what they are multiplied with.
COLUMNS = {
    ("v5e", "w4a16"): (1024, 512),
    ("v5e", "w4a8"): (1024, 512),
    ("v5p", "w4a16"): (512, 1024),
    ("v5p", "w4a8"): (1024, 512),
    ("v6e", "w4a16"): (1024, 1024),
    ("v6e", "w4a8"): (1024, 512),
}
DEFAULT = (1024, 512)  # of chips that the table lacks


def choose(operands: Operands, columns: int | None = None) -> Block:
    """The block for a product on the chip that the program is made for; columns: instead of the table's."""
    rows, outputs = operands.shape
    columns = columns or _columns(chip(), kind(operands), rows <= FEW_ROWS)
    block = Block(min(ROWS, _up(rows, 32)), min(columns, _up(outputs, LANES)))
    while vmem(operands, *block) > 2 * VMEM and block.columns > LANES:
        block = block._replace(columns=_up(block.columns // 2, LANES))
    return block


def kind(operands: Operands) -> str:
    """Bits of the weights and of what they are multiplied with: w4a16 and the like."""
    bits = (jax.dtypes.itemsize_bits(operands.arrays[name].dtype) for name in ("values", "rows"))
    return "w{}a{}".format(*bits)


@functools.cache
def _columns(chip_name: str, kind_name: str, few_rows: bool) -> int:
    few, more = COLUMNS.get((chip_name, kind_name), DEFAULT)
    if (chip_name, kind_name) not in COLUMNS:
        _logger.info("no block sizes of %s products are known for %s: %s", kind_name, chip_name, DEFAULT)
    return few if few_rows else more


def chip() -> str:
    """The kind of chip that the program is made for: "v5e", or JAX's name of what `CHIPS` lacks."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return CHIPS.get(device.device_kind, device.device_kind)


def has_int8() -> bool:
    """Whether its matrix units multiply int8; so does the interpreter on a CPU."""
    return chip() in (*INT8, "cpu")


def vmem(operands: Operands, rows: int, columns: int) -> int:
    """Bytes of fast memory that a kernel may use: two of each block, and as much again for what is computed."""
    by_row = {name: array.shape[-1] for name, array in operands.arrays.items() if array.ndim == 2}
    bits = sum(rows * width * jax.dtypes.itemsize_bits(operands.arrays[name].dtype) for name, width in by_row.items())
    for name, array in operands.arrays.items():
        if name not in by_row:
            bits += array.shape[1] * columns * jax.dtypes.itemsize_bits(array.dtype)
    return 2 * (2 * bits // 8 + rows * columns * 4) + 2**20


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
