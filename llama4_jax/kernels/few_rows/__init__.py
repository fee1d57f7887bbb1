"""Products of few rows with large matrices; see `api`."""

from llama4_jax.kernels.few_rows.api import FEW_ROWS, grouped, multiply

__all__ = ["FEW_ROWS", "grouped", "multiply"]
