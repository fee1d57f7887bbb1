"""Pictures to Llama 4's tiles: bit-equal to Meta's transform, every kind of file, and errors for what is no picture.

`canvas.npz` holds what Meta's transform chose for 800 sizes; the photographs come from the wheel of `llama-models`.
"""

import hashlib
import importlib.util
import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llama4_jax.data import images

GOLDENS = pathlib.Path(__file__).parent / "canvas.npz"
PHOTOGRAPHS = pathlib.Path(importlib.util.find_spec("llama_models").origin).parent / "resources"


@pytest.mark.parametrize(
    ("name", "grid", "sha256"),
    [
        ("dog.jpg", (2, 2), "027af0fc16c128dcfff229b1ec768266620ffcf10f2ffee973a1f73ec5b85f80"),
        ("pasta.jpeg", (4, 4), "4205b4a5916a2790"),
    ],
)
def test_photographs_have_the_bits_of_the_reference(name, grid, sha256):
    tiles, found = images.tile(images.read(PHOTOGRAPHS / name))
    assert found == grid
    assert tiles.dtype == np.float32 and tiles.shape == (grid[0] * grid[1] + 1, 336, 336, 3)
    planes = np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))
    assert hashlib.sha256(planes.tobytes()).hexdigest().startswith(sha256)


def test_canvases_and_sizes_are_those_of_the_reference():
    [rows] = np.load(GOLDENS).values()
    assert len(rows) == 800
    for height, width, *wanted in rows.tolist():
        shape = images.canvas(height, width, 336, 16)
        size = images.fit(height, width, shape[0] * 336, shape[1] * 336, 336)
        assert [*shape, *size] == wanted, (height, width)


def test_a_small_picture_is_enlarged_to_one_tile_at_most():
    tiles, grid = images.tile(Image.new("RGB", (40, 50), "white"))
    assert grid == (1, 1) and tiles.shape == (1, 336, 336, 3)
    covered = (tiles[0] == 1).all(-1)
    assert covered[:, :268].all() and not covered[:, 268:].any()  # 40 * 336 / 50 = 268.8, floored


@pytest.mark.parametrize(("size", "grid"), [((1, 1), (1, 1)), ((5000, 3), (1, 15)), ((3, 5000), (15, 1))])
def test_extreme_shapes_keep_every_pixel_row(size, grid):
    tiles, found = images.tile(Image.new("RGB", size, "white"))
    assert found == grid
    assert (tiles.reshape(-1, 3) == 1).all(-1).any()
    assert np.isfinite(tiles).all() and np.abs(tiles).max() <= 1


def test_fewer_and_smaller_tiles_can_be_asked_for():
    tiles, grid = images.tile(Image.new("RGB", (100, 40), "white"), tile_size=16, max_tiles=4)
    assert grid == (1, 3) and tiles.shape == (4, 16, 16, 3)
    with pytest.raises(ValueError, match="max_tiles=0 must be at least 1"):
        images.tile(Image.new("RGB", (4, 4)), max_tiles=0)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(images.to_tile(images.read(animation), 2)[0, 0], [1, -1, -1])


def test_pictures_are_read_from_bytes_paths_and_files(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(encoded(Image.new("RGB", (8, 6), "red"), "png"))
    with path.open("rb") as file:
        pictures = [images.read(source) for source in (path.read_bytes(), path, str(path), file)]
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (8, 6))] * 4


def test_transparent_grey_palette_and_print_pictures_are_read_as_colours():
    kinds = {"RGBA": (255, 0, 0, 0), "LA": (9, 0), "L": 255, "I;16": 65_535, "P": 0}
    for mode, colour in kinds.items():
        picture = Image.new(mode, (4, 4), colour)
        if mode == "P":
            picture.putpalette([255, 255, 255])
        np.testing.assert_array_equal(np.asarray(images.read(encoded(picture, "png"))), 255, err_msg=mode)
    cyan = images.read(encoded(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "tiff"))
    np.testing.assert_array_equal(np.asarray(cyan)[0, 0], [0, 255, 255])


@pytest.mark.parametrize("kept", [0, 1, 8, 60, 300])
def test_truncated_pictures_are_refused(kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for kind in ("png", "jpeg"):
        with pytest.raises(ValueError, match="the picture is (no picture|a damaged picture)"):
            images.read(encoded(noise, kind)[:kept])


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match="notes.png is no picture that Pillow reads"):
        images.read(path)
    with pytest.raises(FileNotFoundError):
        images.read(tmp_path / "absent.png")


def test_decompression_bombs_are_refused_before_they_are_decoded():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="12000 x 12000 pixels, more than the 100,000,000 allowed"):
        images.read(bomb)


def test_files_over_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="bytes, more than the 100 allowed"):
        images.read(encoded(Image.new("RGB", (64, 64), "red"), "bmp"))
