"""Products of few rows with large matrices; see `api`."""

from llama4_jax.kernels.few_rows import large_pages
from llama4_jax.kernels.few_rows.api import FEW_ROWS, each, each_plain, grouped, multiply
from llama4_jax.kernels.few_rows.packed import Packed, can_pack, join, pack

__all__ = ["FEW_ROWS", "Packed", "can_pack", "each", "each_plain", "grouped", "join", "large_pages", "multiply", "pack"]
