"""Weights in and out of other people's files."""

from llama4_jax.checkpoint.hf import from_tensors, load_hf, save_hf, to_tensors

__all__ = ["from_tensors", "load_hf", "save_hf", "to_tensors"]
