"""Models small enough to be compiled over and over in tests, with weights at which every mistake shows."""

from __future__ import annotations

import dataclasses

from llama4_jax import checkpoint
from llama4_jax.checkpoint import hf
from llama4_jax.config import Llama4Config, presets
from llama4_jax.model import Llama4
from llama4_jax.testing import goldens

CHUNK = 4


def text_config(num_layers: int = 5) -> Llama4Config:
    """Text only; period 2 (chunked, global), mixtures throughout, chunks of 4; an odd depth leaves a layer over."""
    text = presets.tiny().text
    attention = dataclasses.replace(text.attention, chunk_size=CHUNK, floor_scale=3, nope_interval=2)
    moe = dataclasses.replace(text.moe, step=1)
    return Llama4Config(text=dataclasses.replace(text, num_layers=num_layers, attention=attention, moe=moe))


def vision_config(num_layers: int = 2, vocab_size: int = 128, patch_token: int = 0) -> Llama4Config:
    """The same with a vision tower: tiles of 16 pixels, 4 tokens each."""
    config = text_config(num_layers)
    text = dataclasses.replace(config.text, vocab_size=vocab_size)
    return dataclasses.replace(config, text=text, vision=presets.tiny().vision, patch_token=patch_token)


def model(config: Llama4Config, seed: int = 0, *, scan: bool = True) -> Llama4:
    """A float32 model with weights drawn by numpy, as those of goldens: nothing is compiled to make it."""
    return checkpoint.from_tensors(config, goldens.draw_all(hf.tensor_shapes(config), seed), scan=scan)
