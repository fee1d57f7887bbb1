"""Attention over a sequence that is spread over devices: keys travel round a ring, queries stay. Read `portable` first."""

from llama4_jax.kernels.attention.ring.api import IMPLEMENTATIONS, over_mesh
from llama4_jax.kernels.attention.ring.zigzag import order, work

__all__ = ["IMPLEMENTATIONS", "order", "over_mesh", "work"]
