"""Early fusion: image features take the place of the embeddings at `<|patch|>` positions, in order.

The features of all tiles, in order of appearance over the flattened batch, fill the placeholders one by one; nothing
in masks or positions knows of images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def fuse(embeddings: jax.Array, features: jax.Array, placeholders: jax.Array) -> jax.Array:
    """embeddings [b t d] with features [n p d] at placeholders [b t] bool.

    Where the placeholders are known (outside jit) their number must equal that of the features. Under jit it cannot be
    seen: a batch checks itself on the host, and surplus features at the end, which pad a batch of images to a fixed
    size, are ignored.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(embeddings.dtype)
    if not isinstance(placeholders, jax.core.Tracer):
        check(int(np.sum(np.asarray(placeholders))), flat.shape[0])
    index = jnp.cumsum(placeholders.reshape(-1)) - 1
    chosen = flat[jnp.clip(index, 0, flat.shape[0] - 1)].reshape(embeddings.shape)
    return jnp.where(placeholders[..., None], chosen, embeddings)


def check(placeholders: int, features: int) -> None:
    """Raises ValueError when the number of placeholders is not that of the features."""
    if placeholders != features:
        raise ValueError(
            f"{placeholders} patch placeholders in the tokens but {features} image features; give one tile for each "
            "group of placeholders, in order of appearance, and one placeholder for each feature of a tile"
        )
