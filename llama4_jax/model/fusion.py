"""Early fusion: image features take the place of the embeddings at `<|patch|>` positions, in order.

The features of all tiles, in order of appearance over the flattened batch, fill the placeholders one by one; nothing
in masks or positions knows of images. Appearance is in the row's own order, also where devices hold it in another.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.kernels.attention import Layout


def fuse(
    embeddings: jax.Array, features: jax.Array, placeholders: jax.Array, layout: Layout | None = None
) -> jax.Array:
    """embeddings [b t d] with features [n p d] at placeholders [b t] bool, which lie as `layout` says (default: in order).

    Where the placeholders are known (outside jit) their number must equal that of the features. Under jit it cannot be
    seen: a batch checks itself on the host, and surplus features at the end, which pad a batch of images to a fixed
    size, are ignored.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(embeddings.dtype)
    if not isinstance(placeholders, jax.core.Tracer):
        check(int(np.sum(np.asarray(placeholders))), flat.shape[0])
    layout = layout or Layout()
    index = layout.place(_rank(layout.row(placeholders))).reshape(-1)
    chosen = flat[jnp.clip(index, 0, flat.shape[0] - 1)].reshape(embeddings.shape)
    return jnp.where(placeholders[..., None], chosen, embeddings)


def _rank(placeholders: jax.Array) -> jax.Array:
    """The number of each placeholder in the flattened batch, from 0; [b t], of use at placeholders only."""
    return jnp.cumsum(placeholders.reshape(-1)).reshape(placeholders.shape) - 1


def check(placeholders: int, features: int) -> None:
    """Raises ValueError when the number of placeholders is not that of the features."""
    if placeholders != features:
        raise ValueError(
            f"{placeholders} patch placeholders in the tokens but {features} image features; give one tile for each "
            "group of placeholders, in order of appearance, and one placeholder for each feature of a tile"
        )
