"""Weights in and out of other people's files."""

from llama4_jax.checkpoint.hf import from_tensors, load_hf, save_hf, tensor_shapes, to_tensors

__all__ = ["from_tensors", "load_hf", "save_hf", "tensor_shapes", "to_tensors"]
