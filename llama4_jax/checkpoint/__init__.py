"""Weights in and out of other people's files."""

from llama4_jax.checkpoint.hf import from_tensors, load_hf, save_hf, tensor_shapes, to_tensors
from llama4_jax.checkpoint.layouts import HF_FUSED, HF_UNFUSED
from llama4_jax.checkpoint.meta import load_meta, save_meta
from llama4_jax.checkpoint.peft import load_peft, save_peft

__all__ = [
    "HF_FUSED",
    "HF_UNFUSED",
    "from_tensors",
    "load_hf",
    "load_meta",
    "load_peft",
    "save_hf",
    "save_meta",
    "save_peft",
    "tensor_shapes",
    "to_tensors",
]
