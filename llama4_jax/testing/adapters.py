"""Adapters as they are in the middle of training: no factor is zero, so that every mistake shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config.lora import LoraConfig
from llama4_jax.core import names
from llama4_jax.model import Llama4, lora


def trained(model: Llama4, config: LoraConfig, seed: int = 0) -> Llama4:
    """`model` with adapters whose factors are drawn by numpy; they move the logits of tiny models by whole units.

    Nothing is compiled to make it.
    """
    structure, shapes, _ = lora.split(jax.eval_shape(lambda model: lora.attach(model, config), model))
    random = np.random.RandomState(seed)
    drawn = {name: random.normal(0, 0.15, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    return structure.merge(names.split(model)[1] | {name: jnp.asarray(leaf) for name, leaf in drawn.items()})
