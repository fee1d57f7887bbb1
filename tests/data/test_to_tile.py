"""Pictures of every mode to tiles: white behind transparency, upright, square, in [-1, 1]."""

import io

import numpy as np
import pytest
from PIL import Image

from llama4_jax.data.images import to_tile

RED = [1.0, -1.0, -1.0]


def pixel(picture: Image.Image, size: int = 2) -> list[float]:
    """The colour of a picture that has one colour."""
    tile = to_tile(picture, size)
    assert tile.shape == (size, size, 3)
    assert tile.dtype == np.float32
    np.testing.assert_array_equal(tile, np.broadcast_to(tile[0, 0], tile.shape))
    return tile[0, 0].tolist()


def test_black_is_minus_one_and_white_is_one():
    assert pixel(Image.new("RGB", (5, 5), "black")) == [-1.0, -1.0, -1.0]
    assert pixel(Image.new("RGB", (5, 5), "white")) == [1.0, 1.0, 1.0]


def test_a_picture_of_the_tile_size_is_only_rescaled():
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    tile = to_tile(Image.fromarray(levels), 8)
    np.testing.assert_array_equal(tile, levels.astype(np.float32) / 127.5 - 1)
    assert np.abs(tile).max() <= 1


def test_transparency_becomes_white():
    assert pixel(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == [1.0, 1.0, 1.0]
    assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 255))) == RED
    half = pixel(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    assert half == pytest.approx([-2 * 128 / 255 + 1] * 3, abs=1 / 127.5)  # one level of rounding


def test_colour_under_transparency_does_not_bleed_into_its_neighbours():
    """Resizing before compositing would mix hidden black into the border."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = [255, 0, 0, 255]
    tile = to_tile(Image.fromarray(pixels), 4)
    np.testing.assert_array_equal(tile[..., 0], 1.0)  # red and white have red in full, and so has every mixture


def test_grey_and_palette_pictures_become_colours():
    assert pixel(Image.new("L", (3, 3), 51)) == pytest.approx([-0.6] * 3)
    assert pixel(Image.new("LA", (3, 3), (51, 0))) == [1.0] * 3
    assert pixel(Image.new("1", (3, 3), 1)) == [1.0] * 3
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(palette) == RED
    palette.info["transparency"] = 1
    assert pixel(palette) == [1.0] * 3


def test_sixteen_bit_grey_keeps_its_range():
    levels = np.array([[0, 65_535], [32_768, 16_384]], np.uint16)
    tile = to_tile(Image.fromarray(levels), 2)
    np.testing.assert_allclose(tile[..., 0], levels / 32_767.5 - 1, atol=2 / 255)


def test_print_colours_become_screen_colours():
    assert pixel(Image.new("CMYK", (3, 3), (0, 255, 255, 0))) == RED


def test_the_camera_s_orientation_is_undone():
    """Orientation 6: the sensor's top row is the right column of the scene."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = [255, 0, 0]
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, "png", exif=exif)
    tile = to_tile(Image.open(file), 4)
    np.testing.assert_array_equal(tile[:, 3], [RED] * 4)
    np.testing.assert_array_equal(tile[:, :3], -1.0)


def test_an_oblong_picture_fills_the_square():
    pixels = np.zeros((2, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    tile = to_tile(Image.fromarray(pixels), 4)
    np.testing.assert_array_equal(tile[:, 0], -1.0)
    np.testing.assert_array_equal(tile[:, 3], 1.0)
