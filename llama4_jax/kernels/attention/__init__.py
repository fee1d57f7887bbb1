"""Causal, chunked, packed and cached attention under one mask rule; read `api`, `mask`, `reference`, then the rest."""

from llama4_jax.kernels.attention.api import attend
from llama4_jax.kernels.attention.layout import Layout, lay_out
from llama4_jax.kernels.attention.reference import attend_all
from llama4_jax.kernels.attention.sequence import Rows, attend_sequence

__all__ = ["Layout", "Rows", "attend", "attend_all", "attend_sequence", "lay_out"]
