"""Operations of tensorflow-text: repair with a count, NFC with a way back, scripts, shapes, sentences."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data.preparation import normalise
from llama4_jax.data.preparation.offsets import Offsets

# Whole characters, composed and not, and bytes that are no UTF-8: lone, truncated, overlong, surrogate, too large.
PIECES = [
    b"a",
    b" ",
    "é".encode(),
    "e\u0301".encode(),
    "A\u030a".encode(),
    "\u0958".encode(),
    "中".encode(),
    "😀".encode(),
]
PIECES += [b"\xff", b"\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3"]
SOURCES = st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)


def test_ill_formed_bytes_become_replacement_characters_and_are_counted():
    (found,) = normalise.normalise([b"ab\xff\xfecd \xe2\x82 x"])
    assert found.text == "ab\ufffd\ufffdcd \ufffd x".encode()
    assert found.repaired == 4


def test_composed_text_leads_back_to_the_decomposed_source():
    source = "cafe\u0301 x".encode()
    (found,) = normalise.normalise([source])
    assert found.text == "café x".encode()
    # é lies at bytes 3 to 5 of the text, and at 3 to 6 of the source.
    assert found.offsets.to_source([3, 5, 6, 7]).tolist() == [3, 6, 7, 8]
    assert found.offsets.as_list()[-1] == [5, 1]


def test_text_that_needs_nothing_is_its_source():
    (found,) = normalise.normalise(["naïve 中".encode()])
    assert (found.text, found.repaired, len(found.offsets)) == ("naïve 中".encode(), 0, 0)


@settings(deadline=None, max_examples=200)
@given(st.lists(SOURCES, min_size=1, max_size=3))
def test_any_bytes_become_what_python_makes_of_them_and_lead_back(sources):
    for source, found in zip(sources, normalise.normalise(sources)):
        text = found.text.decode("utf-8")
        assert text == unicodedata.normalize("NFC", source.decode("utf-8", "replace"))
        # Cut between characters that compose with nothing before them: each piece comes from its piece of the source.
        safe = [i for i in range(len(text)) if unicodedata.combining(text[i]) == 0]
        places = [len(text[:i].encode()) for i in safe] + [len(found.text)]
        back = found.offsets.to_source(places).tolist()
        assert back[-1] == len(source)
        if "\u0915" in text:
            continue  # U+0958 composes to two characters, whose inner border has no place in the source
        for start, end, left, right in zip(places, places[1:], back, back[1:]):
            piece = unicodedata.normalize("NFC", source[left:right].decode("utf-8", "replace"))
            assert piece.encode() == found.text[start:end]


def test_offsets_survive_json():
    offsets = Offsets.of_positions(np.array([0, 2, 3, 4, 8]))
    again = Offsets.of_list(offsets.as_list())
    assert again.to_source(np.arange(5)).tolist() == [0, 2, 3, 4, 8]
    assert offsets.as_list() == [[1, 1], [4, 4]]


def test_scripts_are_counted_in_characters_and_shapes_over_words():
    latin, mixed, none = normalise.makeup([b"Ab cd, EF 12", "да 中文 あ $ 😀".encode(), b""])
    assert latin.scripts == {"Latin": 6} and latin.words == 5
    assert latin.shapes["digits"] == latin.shapes["upper_case"] == latin.shapes["punctuation"] == pytest.approx(1 / 5)
    assert mixed.scripts == {"Cyrillic": 2, "Hiragana": 1, "Han": 2}
    assert mixed.shapes["emoji"] > 0 and mixed.shapes["currency"] > 0
    assert none.words == 0 and not none.scripts and set(none.shapes.values()) == {0.0}


def test_sentences_are_spans_in_bytes_and_split_after_an_abbreviation():
    text = "Für Elise. 它很好。And Dr. Who?".encode()
    spans, nothing = normalise.sentences([text, b""])
    pieces = [text[start:end].decode().strip() for start, end in spans]
    assert pieces == ["Für Elise.", "它很好。", "And Dr.", "Who?"]
    assert nothing.shape == (0, 2)
