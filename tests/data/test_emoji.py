"""Which emoji are chosen, and how they are drawn."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from llama4_jax.data import emoji
from llama4_jax.data.draws import Draw, generator
from llama4_jax.data.rendering import Renderer, Variation

LANGUAGES = ("en", "de", "es", "ru")


def test_every_emoji_is_one_code_point_with_names_and_a_drawing_of_its_own():
    catalogue = emoji.catalogue()
    assert 1300 < len(catalogue) < 1450
    assert all(len(entry.character) == 1 for entry in catalogue)
    assert len({emoji.art(entry.character).tobytes() for entry in catalogue[:200]}) == 200
    apple = next(entry for entry in catalogue if entry.character == "🍎")
    assert (apple.names["en"], apple.names["ru"]) == ("red apple", "красное яблоко")


def test_names_are_normalised_text_without_markup():
    for entry in emoji.catalogue():
        for name in entry.names.values():
            assert name == unicodedata.normalize("NFC", name).strip()
            assert name and ":" not in name.strip("：") and "_" not in name


def test_skin_tones_flags_and_clock_faces_are_never_chosen():
    chosen = {ord(entry.character) for entry in emoji.select(600, LANGUAGES)}
    assert not chosen & {*range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400), *range(0x1F550, 0x1F568)}


def test_the_same_seed_chooses_the_same_emoji_and_another_seed_others():
    first, again, other = (emoji.select(50, LANGUAGES, seed) for seed in (0, 0, 1))
    assert first == again
    assert {entry.character for entry in first} != {entry.character for entry in other}


def test_chosen_names_are_unique_in_each_language():
    chosen = emoji.select(400, LANGUAGES)
    for language in LANGUAGES:
        assert len({entry.names[language].casefold() for entry in chosen}) == len(chosen)


def test_chosen_emoji_differ_to_the_eye():
    pictures = [emoji.art(entry.character).resize((16, 16)) for entry in emoji.select(60, LANGUAGES)]
    pixels = np.stack([np.asarray(picture, np.float32).ravel() / 255 for picture in pictures])
    difference = np.sqrt(np.square(pixels[:, None] - pixels[None, :]).mean(-1)) + np.eye(60)
    # The choice itself compares on grey ground with another filter: hence some slack.
    assert difference.min() > emoji.DISTINCT / 2


def test_too_many_emoji_or_an_unknown_language_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"wanted 5000 distinct emoji .* found \d+; use num_emoji <= \d+"):
        emoji.select(5000, LANGUAGES)
    with pytest.raises(ValueError, match="no emoji names in 'xx'; choose from en, es"):
        emoji.select(5, ("en", "xx"))


def test_held_out_pairs_have_the_share_asked_for_and_depend_on_nothing_else():
    pairs = [(entry.character, language) for entry in emoji.catalogue() for language in emoji.LANGUAGES]
    few = {pair for pair in pairs if emoji.is_held_out(*pair, 0.05)}
    more = {pair for pair in pairs if emoji.is_held_out(*pair, 0.2)}
    deviation = (0.05 * 0.95 / len(pairs)) ** 0.5
    assert abs(len(few) / len(pairs) - 0.05) < 5 * deviation
    assert few < more  # a larger share only adds pairs


@pytest.fixture(scope="module")
def renderer():
    return Renderer(["🍎", "🐸"], 48)


def test_a_rendering_is_a_function_of_the_generator_alone(renderer):
    first, again, other = (renderer.render("🍎", generator(0, Draw.TRAIN_RENDERING, place)) for place in (7, 7, 8))
    assert first.shape == (48, 48, 3) and first.dtype == np.float32
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 0.05


def test_pixels_fill_the_range_and_do_not_leave_it(renderer):
    rng = np.random.default_rng(0)
    pictures = np.stack([renderer.render("🐸", rng) for _ in range(50)])
    assert -1 <= pictures.min() < -0.9 and 0.9 < pictures.max() <= 1 + 1e-6


def test_training_and_held_out_renderings_come_from_different_streams(renderer):
    train, heldout = (
        renderer.render("🍎", generator(0, draw, 0)) for draw in (Draw.TRAIN_RENDERING, Draw.HELDOUT_RENDERING)
    )
    assert not np.array_equal(train, heldout)


def test_the_drawing_is_where_and_as_large_as_it_was_asked_to_be():
    still = Variation(smallest=0.5, largest=0.5, rotation=0.0, overhang=-0.25, darkest=1.0, grain=0.0)
    picture = Renderer(["🟥"], 64, still).render("🟥", np.random.default_rng(0))  # white ground, centred
    drawn = np.argwhere(picture.min(axis=-1) < 0)
    # Half of 64 pixels, in the middle; one pixel of resampling at each edge.
    assert np.abs(drawn.min(axis=0) - 16).max() <= 1 and np.abs(drawn.max(axis=0) - 47).max() <= 1
    assert np.allclose(picture[[0, 0, -1, -1], [0, -1, 0, -1]], 1)


def test_turning_the_drawing_equals_turning_its_picture_about_the_middle():
    still = {"smallest": 0.6, "largest": 0.6, "overhang": -0.2, "darkest": 1.0, "grain": 0.0}  # white ground, centred
    upright = Renderer(["🍎"], 48, Variation(rotation=0.0, **still)).render("🍎", np.random.default_rng(5))
    turned = Renderer(["🍎"], 48, Variation(rotation=90.0, **still)).render("🍎", np.random.default_rng(5))
    degrees = 90 * (2 * np.random.default_rng(5).random(4)[1] - 1)
    bytes_of = Image.fromarray(np.uint8(np.round((upright + 1) * 127.5)))
    expected = np.asarray(bytes_of.rotate(-degrees, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))) / 127.5 - 1
    # Sampling twice blurs the outlines: compare with how much a turn the wrong way would change.
    wrong = np.asarray(bytes_of.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))) / 127.5 - 1
    assert np.abs(turned - expected).mean() < 0.2 * np.abs(turned - wrong).mean()
