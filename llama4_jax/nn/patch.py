"""Pixels to patches, and patches to fewer, wider tokens."""

from __future__ import annotations

import einops
import jax


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[n h w c] to [n p (c py px)], patches in row-major order, features ordered channel, row, column."""
    return einops.rearrange(images, "n (gy py) (gx px) c -> n (gy gx) (c py px)", py=patch_size, px=patch_size)


def pixel_shuffle(x: jax.Array, grid: int, factor: int) -> jax.Array:
    """[n (grid grid) d] to [n (grid/factor)^2 (dy dx d)]: neighbouring patches become one token."""
    return einops.rearrange(
        x, "n (y dy x dx) d -> n (y x) (dy dx d)", y=grid // factor, x=grid // factor, dy=factor, dx=factor
    )
