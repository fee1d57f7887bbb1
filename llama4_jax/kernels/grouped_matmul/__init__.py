"""Products of sorted rows with their own group's matrix; read `api`, `reference`, then the implementations."""

from llama4_jax.kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
