"""The whole model: decoder, vision tower, fusion and cache."""

from llama4_jax.model.cache import Cache
from llama4_jax.model.llama4 import Hidden, Llama4, Output, initialise

__all__ = ["Cache", "Hidden", "Llama4", "Output", "initialise"]
