"""Rows that change devices in parts of uneven size; read `api`, `emulated`, its specification, then `schedule`."""

from llama4_jax.kernels.exchange.api import ragged_all_to_all
from llama4_jax.kernels.exchange.schedule import Parts, Schedule, owned

__all__ = ["Parts", "Schedule", "owned", "ragged_all_to_all"]
