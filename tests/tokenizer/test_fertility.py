"""Words and densities, on texts small enough to count by hand."""

import math

import pytest

from llama4_jax import tokenizer
from llama4_jax.tokenizer import fertility
from llama4_jax.tokenizer.fertility import Fertility


def said(text: str) -> list[str]:
    encoded = text.encode()
    return [encoded[start:end].decode() for start, end in fertility.words(text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't read_file(3rd)!", ["It", "isn't", "read_file", "3rd"]),
        ("l’été, 'quoted'", ["l’été", "quoted"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # marks belong to the letter before them
        ("e\u0301te\u0301 한국어 мир", ["e\u0301te\u0301", "한국어", "мир"]),
        ("データ2つーー", ["デ", "ー", "タ", "2", "つ", "ー", "ー"]),
        ("中文 ok", ["中", "文", "ok"]),
        ("a — b … c", ["a", "b", "c"]),
        ("ที่ดี", ["ที่", "ดี"]),
        (" \n\t.,;👍", []),
    ],
)
def test_words_are_runs_of_letters_but_characters_where_no_spaces_are_written(text, words):
    assert said(text) == words


def test_counts_of_one_sentence_cut_by_hand():
    cut = {"a bcd, efg": [b"a b", b"cd", b", efg"], "": []}
    found = fertility.measure(cut.__getitem__, cut)
    # bcd is cut; a and efg share their token with others and are whole.
    assert found == Fertility(bytes=10, words=3, tokens=3, unbroken=2)
    assert (found.tokens_per_word, found.bytes_per_token, found.unbroken_share) == (1.0, 10 / 3, 2 / 3)


def test_a_character_that_is_cut_into_bytes_is_broken():
    found = fertility.measure(lambda text: [bytes([byte]) for byte in text.encode()], ["中a"])
    assert found == Fertility(bytes=4, words=2, tokens=4, unbroken=1)


def test_counts_of_texts_add_up():
    pieces = lambda text: [text[:2].encode(), text[2:].encode()]  # noqa: E731
    together = fertility.measure(pieces, ["один", "two words"])
    apart = [fertility.measure(pieces, [text]) for text in ("один", "two words")]
    assert together.bytes == sum(one.bytes for one in apart) == 17
    assert together.words == sum(one.words for one in apart) == 3
    assert together.unbroken == sum(one.unbroken for one in apart) == 1


def test_without_words_or_tokens_ratios_are_not_numbers():
    nothing = fertility.measure(lambda text: [], [""])
    assert all(math.isnan(x) for x in (nothing.tokens_per_word, nothing.bytes_per_token, nothing.unbroken_share))


def test_a_tokenizer_that_changes_the_text_is_refused():
    with pytest.raises(ValueError, match="join to other bytes"):
        fertility.measure(lambda text: [text.lower().encode()], ["ABC"])


def test_trained_merges_are_denser_than_bytes(tok, texts):
    bytes_alone = tokenizer.Tokenizer({bytes([byte]): byte for byte in range(256)})
    few, many = (fertility.measure(t.pieces, texts) for t in (tok, bytes_alone))
    assert few.words == many.words
    assert many.bytes_per_token == 1.0 and few.bytes_per_token > 1.7
    assert few.tokens_per_word < many.tokens_per_word and few.unbroken_share > many.unbroken_share
