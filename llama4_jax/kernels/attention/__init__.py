"""Causal, chunked, packed and cached attention under one mask rule; read `api`, `mask`, `reference`, then the rest."""

from llama4_jax.kernels.attention.api import attend, attend_sequence
from llama4_jax.kernels.attention.layout import Layout, lay_out
from llama4_jax.kernels.attention.reference import attend_all

__all__ = ["Layout", "attend", "attend_all", "attend_sequence", "lay_out"]
