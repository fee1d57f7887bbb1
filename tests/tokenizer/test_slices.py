"""Long texts in parts: the ids of the whole, whatever the text, and bounded work on texts without a border."""

import sys
import unicodedata

import pytest
import regex  # comes with tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama4_jax.tokenizer import bpe, slices

# Each piece is the trouble of some alternative of the split pattern: contractions in both cases, marks, titlecase and
# modifier letters, numbers that are letters to some, newlines of all kinds, space that is not ASCII, slashes.
NASTY = [
    *("a", "Z", "Ab", "é", "e\u0301", "\u0301", "ǅ", "ʰ", "赤", "一", "½", "٣", "7", "1234", "'", "'s", "'RE", "’t"),
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\n\n", " \n", "\u00a0", "\u3000", "\u2028", "\x85", "\x0b", "\x1c"),
    *(
        "/",
        "//",
        ".",
        "!",
        "_",
        "-",
        "(",
        "。",
        "🙂",
        "\u200d",
        "\x00",
        "<|eot|>",
        "<|",
        "|>",
        "\ud83d",
        "\ud83d\ude42",
    ),
]
nasty_text = st.lists(st.sampled_from(NASTY), max_size=40).map("".join) | st.text(max_size=40)


def _pieces(texts):
    """What byte-pair merging gets to see. Tokens of a small vocabulary would hide most wrong cuts."""
    return [piece for text in texts for piece in regex.findall(bpe.SPLIT_PATTERN, text)]


@settings(max_examples=1500, deadline=None)
@given(text=nasty_text, window=st.integers(1, 12))
@example(text="a  \n  b", window=1)
@example(text="!\n/\nx", window=1)
@example(text="don't  go'S  \r\n\r\n /x", window=1)
def test_a_cut_at_a_border_changes_no_piece_and_no_token(tok, text, window):
    parts = list(slices.parts(text, window, longest=10**6))
    assert "".join(parts) == text and all(parts)
    assert _pieces(parts) == _pieces([text])
    tokens = [token for part in parts for token in tok._encoding.encode_ordinary(part)]
    assert tokens == tok._encoding.encode_ordinary(text)


def test_borders_are_found_in_prose_code_tables_and_one_long_line():
    for text in ("One line, and\nanother. ", "f(x);\n", "----\n====\n", "key=value&", "0123456789abcdef", "赤リンゴ。"):
        parts = list(slices.parts(text * 40, window=10, longest=50))
        assert max(map(len, parts)) <= 10 + len(text)


def test_letters_numbers_and_nothing_else_may_stand_before_a_border():
    """What a border takes for a letter or number, the split pattern does too, by its Unicode category."""
    taken = {chr(code) for code in range(sys.maxunicode + 1) if slices._BORDER.match(chr(code) + ".")} - {"\r", "\n"}
    assert {unicodedata.category(character)[0] for character in taken} == {"L", "N"}


@settings(max_examples=300, deadline=None)
@given(text=nasty_text, window=st.integers(1, 5), longest=st.integers(0, 5))
def test_a_part_is_never_longer_than_asked(text, window, longest):
    parts = list(slices.parts(text, window, longest))
    assert "".join(parts) == text
    assert all(0 < len(part) <= window + longest for part in parts)


def test_long_numbers_are_cut_between_their_groups_of_three():
    text = "circle=3." + "14159265358979" * 20
    parts = list(slices.parts(text, window=16, longest=16))
    assert len(parts) > 5
    assert _pieces(parts) == _pieces([text])


def test_encoding_a_long_text_gives_the_ids_of_the_whole(tok, texts):
    text = "\n".join(texts * 30)
    assert len(text) > 5 * slices.WINDOW
    assert tok.encode(text) == tok._encoding.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(text=nasty_text)
@example(text="<|<|eot|>eot|>")
@example(text="<|eot|eot|>")
def test_asked_for_special_tokens_are_found_as_tiktoken_finds_them(tok, text):
    assert tok.encode(text, allow_special=True) == tok._encoding.encode(text, allowed_special="all")


def test_a_special_token_on_a_border_stays_whole(tok):
    text = "a" * (slices.WINDOW - 4) + "<|eot|>" + " b" * slices.WINDOW
    assert tok.encode(text, allow_special=True).count(tok.special["eot"]) == 1
    assert tok.special["eot"] not in tok.encode(text)


@pytest.mark.parametrize("character", ["a", " ", "^", "\n", "赤", "7"])
def test_a_text_of_one_endless_run_is_encoded_and_decodes_to_itself(tok, character):
    text = character * 1_000_000
    assert tok.decode(tok.encode(text)) == text
