"""Frozen, keyword-only configuration; imports no JAX."""

from llama4_jax.config import presets
from llama4_jax.config.model import (
    Attention,
    AttentionConfig,
    FeedForward,
    LayerKind,
    Llama4Config,
    MoeConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
    layer_kinds,
)
from llama4_jax.config.overrides import apply, from_dict, to_dict

__all__ = [
    "Attention",
    "AttentionConfig",
    "FeedForward",
    "LayerKind",
    "Llama4Config",
    "MoeConfig",
    "RopeScaling",
    "TextConfig",
    "VisionConfig",
    "apply",
    "from_dict",
    "layer_kinds",
    "presets",
    "to_dict",
]
