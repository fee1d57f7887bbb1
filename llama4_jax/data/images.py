"""Pictures of any kind to tiles of a fixed size, as the vision tower takes them.

`tile` is Llama 4's own cutting of a picture into up to 16 tiles and a small view of the whole; `to_tile` puts the whole
picture into one square tile, which is all that a model with small tiles needs.

Source: the image transform in Meta's llama-models, which `tile` equals bit for bit.
"""

from __future__ import annotations

import io
import os
import pathlib
import warnings
from typing import BinaryIO

import einops
import numpy as np
from PIL import Image, ImageOps

MAX_BYTES = 64 * 2**20  # of an encoded picture
MAX_PIXELS = 100_000_000  # of a decoded one: more is taken for a decompression bomb


def read(source: bytes | str | os.PathLike | BinaryIO) -> Image.Image:
    """The picture in a file or in bytes, decoded, upright, 8-bit RGB on white; of an animation, the first frame.

    Raises ValueError, saying which, for what is too large, is no picture, or is cut off. A path that cannot be read
    raises OSError.
    """
    name, encoded = _encoded(source)
    if len(encoded) > MAX_BYTES:
        raise ValueError(f"{name} has {len(encoded):,} bytes, more than the {MAX_BYTES:,} allowed; shrink the picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            picture = Image.open(io.BytesIO(encoded))
            _check_size(picture, name)
            picture.load()
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no picture that Pillow reads ({error}); give a PNG, JPEG, WebP or GIF") from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow's decoders raise all three on damaged files
        raise ValueError(f"{name} is a damaged picture ({error}); fetch it again") from error
    return _rgb(picture)


def tile(picture: Image.Image, tile_size: int = 336, max_tiles: int = 16) -> tuple[np.ndarray, tuple[int, int]]:
    """The picture cut into tiles [n tile_size tile_size 3], float32 in [-1, 1], and how many (rows, columns) they make.

    The picture keeps its proportions, is enlarged no further than one tile needs, and lies top left on black. With more
    than one tile, the last one (n = rows * columns + 1) is the whole picture, squeezed into a square.

    Raises ValueError for sizes below 1.
    """
    if tile_size < 1 or max_tiles < 1:
        raise ValueError(f"tile_size={tile_size} and max_tiles={max_tiles} must be at least 1")
    _check_size(picture, "the picture")
    picture = _rgb(picture)
    rows, columns = canvas(picture.height, picture.width, tile_size, max_tiles)
    height, width = fit(picture.height, picture.width, rows * tile_size, columns * tile_size, tile_size)
    board = Image.new("RGB", (columns * tile_size, rows * tile_size))
    board.paste(picture.resize((width, height), Image.Resampling.BILINEAR))
    tiles = einops.rearrange(_normalised(board), "(r y) (c x) rgb -> (r c) y x rgb", r=rows, c=columns)
    if rows * columns > 1:
        whole = picture.resize((tile_size, tile_size), Image.Resampling.BILINEAR)
        tiles = np.concatenate([tiles, _normalised(whole)[None]])
    return tiles, (rows, columns)


def canvas(height: int, width: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """(rows, columns) of tiles for a picture: the one that needs least enlargement, or failing that least reduction.

    Of equals, the one of fewest tiles. Scales are compared in float32, as the reference does.
    """
    shapes = np.array([(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)])
    scales = (shapes * tile_size / np.array([height, width])).astype(np.float32).min(axis=1)
    best = scales[scales >= 1].min() if (scales >= 1).any() else scales.max()
    candidates = shapes[scales == best]
    rows, columns = candidates[candidates.prod(axis=1).argmin()]
    return int(rows), int(columns)


def fit(height: int, width: int, canvas_height: int, canvas_width: int, tile_size: int) -> tuple[int, int]:
    """(height, width) to which a picture is resized for its canvas, proportions kept, neither side below 1.

    A side is enlarged to `tile_size` at most.
    """
    bound_height = min(max(height, tile_size), canvas_height)
    bound_width = min(max(width, tile_size), canvas_width)
    by_height, by_width = bound_height / height, bound_width / width
    if by_width < by_height:
        return max(1, min(int(height * by_width), bound_height)), bound_width
    return bound_height, max(1, min(int(width * by_height), bound_width))


def to_tile(picture: Image.Image, size: int) -> np.ndarray:
    """The whole picture as one tile, float32 [size size 3] in [-1, 1]; transparency becomes white, shape a square."""
    return _normalised(_rgb(picture).resize((size, size), Image.Resampling.BILINEAR))


def _normalised(picture: Image.Image) -> np.ndarray:
    """[height width 3] float32, 0 to -1 and 255 to 1, rounded as (level / 255 - mean) / deviation is, both 0.5."""
    levels = np.asarray(picture, np.float32) / np.float32(255)
    return (levels - np.float32(0.5)) / np.float32(0.5)


def _rgb(picture: Image.Image) -> Image.Image:
    """Upright and without transparency. Composited before resizing: hidden colours must not bleed into the border."""
    if picture.mode == "RGB" and "transparency" not in picture.info and not picture.getexif().get(_ORIENTATION):
        return picture
    picture = _eight_bits(ImageOps.exif_transpose(picture))
    if picture.mode == "CMYK":
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    opaque = Image.new("RGBA", picture.size, "white")
    opaque.alpha_composite(picture)
    return opaque.convert("RGB")


_ORIENTATION = 0x0112


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Sixteen-bit grey as eight-bit grey: Pillow's own conversion would turn all above 255 white."""
    if not picture.mode.startswith("I"):
        return picture
    levels = np.clip(np.asarray(picture), 0, 65_535)
    return Image.fromarray(np.round(levels / 257).astype(np.uint8))


def _check_size(picture: Image.Image, name: str) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {picture.width} x {picture.height} pixels, more than the {MAX_PIXELS:,} allowed; shrink it first"
        )


def _encoded(source) -> tuple[str, bytes]:
    """What to call the source in messages, and its bytes (at most one more than are allowed)."""
    if isinstance(source, bytes):
        return "the picture", source
    if isinstance(source, (str, os.PathLike)):
        with pathlib.Path(source).open("rb") as file:
            return str(source), file.read(MAX_BYTES + 1)
    return getattr(source, "name", "the picture"), source.read(MAX_BYTES + 1)
