"""Pictures of any kind to tiles of a fixed size, as the vision tower takes them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_tile(picture: Image.Image, size: int) -> np.ndarray:
    """The whole picture as one tile, float32 [size size 3] in [-1, 1]; transparency becomes white, shape a square."""
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    opaque = Image.new("RGBA", picture.size, "white")
    opaque.alpha_composite(picture)
    resized = opaque.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32) / 127.5 - 1.0
