"""Pictures of any kind to tiles of a fixed size, as the vision tower takes them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_tile(picture: Image.Image, size: int) -> np.ndarray:
    """The whole picture as one tile, float32 [size size 3] in [-1, 1]; transparency becomes white, shape a square."""
    picture = _eight_bits(ImageOps.exif_transpose(picture)).convert("RGBA")
    opaque = Image.new("RGBA", picture.size, "white")
    opaque.alpha_composite(picture)
    resized = opaque.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32) / 127.5 - 1.0


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Sixteen-bit grey as eight-bit grey: Pillow's own conversion would turn all above 255 white."""
    if not picture.mode.startswith("I"):
        return picture
    levels = np.clip(np.asarray(picture), 0, 65_535)
    return Image.fromarray(np.round(levels / 257).astype(np.uint8))
