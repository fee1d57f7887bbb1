"""Products with weights held in few bits; read `api`, `reference`, then the implementations."""

from llama4_jax.kernels.int4_matmul.api import grouped, matmul
from llama4_jax.kernels.int4_matmul.reference import rounded

__all__ = ["grouped", "matmul", "rounded"]
