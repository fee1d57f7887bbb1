"""Draws emoji on random backgrounds at random size, place and angle: as many different pictures of each as wanted.

Each drawing is rasterised once, kept at a few sizes, and put on its background by one affine resampling, so a picture
costs well under a millisecond.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llama4_jax.data import emoji

_MARGIN = 1  # clear pixels around a stored drawing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variation:
    """How much renderings of one drawing differ; every quantity is drawn uniformly."""

    smallest: float = 0.6  # size of the drawing as a share of the picture's side, least and
    largest: float = 1.0  # greatest
    rotation: float = 20.0  # greatest angle, degrees, either way
    overhang: float = 0.03  # how far the unturned drawing may leave the picture, as a share of its side
    darkest: float = 0.2  # least red, green and blue of a background, of 1: the art's outlines are black
    grain: float = 0.1  # greatest size of the background's pixel noise, of 1


class Renderer:
    """Renders a fixed set of emoji as float32 [size size 3] in [-1, 1]."""

    def __init__(self, characters: Sequence[str], size: int, variation: Variation | None = None):
        """`size`: side of the pictures, pixels."""
        self.size = size
        self.variation = variation or Variation()
        self._drawings = {character: self._sizes(character) for character in characters}
        ramp = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        self._ramp_x, self._ramp_y = ramp[None, :], ramp[:, None]  # [1 w], [h 1]

    def render(self, character: str, rng: np.random.Generator) -> np.ndarray:
        """One picture [h w c] of `character`, a function of the generator's state alone."""
        # Planes [rgba h w] in memory too: numpy is several times faster over rows than over the 3 colours of a pixel.
        placed = np.ascontiguousarray(np.asarray(self._place(character, rng)).transpose(2, 0, 1), np.float32)
        placed *= 1 / 255  # colour is multiplied by alpha already
        picture = self._background(rng)  # [c h w]
        picture *= 1 - placed[3]
        picture += placed[:3]
        picture *= 2
        picture -= 1
        return np.ascontiguousarray(picture.transpose(1, 2, 0))

    def _place(self, character: str, rng: np.random.Generator) -> Image.Image:
        """The drawing at random size, angle and place, on transparent ground."""
        vary = self.variation
        scale, angle, right, down = rng.random(4)
        scale = vary.smallest + (vary.largest - vary.smallest) * scale
        angle = math.radians(vary.rotation) * (2 * angle - 1)
        room = (1 - scale) / 2 + vary.overhang
        centre_x = self.size * (0.5 + room * (2 * right - 1))
        centre_y = self.size * (0.5 + room * (2 * down - 1))
        # The smallest stored size that is not enlarged: bilinear sampling neither blurs nor skips pixels.
        widths = (d for d in self._drawings[character] if d.width - 2 * _MARGIN >= scale * self.size)
        drawing = next(widths, self._drawings[character][-1])
        # PIL wants, for each pixel of the result, where it comes from: the inverse of scale, turn and shift.
        zoom = (drawing.width - 2 * _MARGIN) / (scale * self.size)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        shift_x = drawing.width / 2 - cos * centre_x - sin * centre_y
        shift_y = drawing.height / 2 + sin * centre_x - cos * centre_y
        return drawing.transform(
            (self.size, self.size),
            Image.Transform.AFFINE,
            (cos, sin, shift_x, -sin, cos, shift_y),
            Image.Resampling.BILINEAR,
        )

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """One colour or a slope between two, with grain; float32 [c h w] in [0, 1]."""
        vary = self.variation
        first, second = rng.uniform(vary.darkest, 1, (2, 3)).astype(np.float32)[:, :, None, None]  # [c 1 1] each
        flat, direction, grain = rng.random(3)
        if flat < 1 / 3:
            second = first
        cos, sin = math.cos(2 * math.pi * direction), math.sin(2 * math.pi * direction)
        # The ramp spans [0, 1] along the diagonal, so that no direction leaves the interval between the colours.
        slope = 0.5 + (cos * self._ramp_x + sin * self._ramp_y) / math.sqrt(2)  # [h w]
        ground = (second - first) * slope
        ground += first
        ground += (2 * vary.grain * grain) * (rng.random(slope.shape, np.float32) - 0.5)
        return np.clip(ground, 0, 1, out=ground)

    def _sizes(self, character: str) -> list[Image.Image]:
        """The drawing at a few widths up to the largest ever asked for, smallest first."""
        drawing = emoji.art(character)
        least, greatest = self.variation.smallest * self.size, self.variation.largest * self.size
        steps = max(1, math.ceil(math.log(greatest / least, 1.2)))
        sides = [round(greatest * (least / greatest) ** (step / steps)) for step in range(steps, -1, -1)]
        return [_with_margin(drawing.resize((side, side), Image.Resampling.BOX)) for side in sides]


def _with_margin(drawing: Image.Image) -> Image.Image:
    """Clear pixels all round: resampling blends straight edges into them instead of cutting them jagged."""
    canvas = Image.new(drawing.mode, (drawing.width + 2 * _MARGIN, drawing.height + 2 * _MARGIN))
    canvas.paste(drawing, (_MARGIN, _MARGIN))
    return canvas
