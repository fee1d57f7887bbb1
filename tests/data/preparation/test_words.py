"""Words: what counts as one, and hashes that are equal exactly where the words are."""

import collections

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.data.preparation import words

LETTERS = st.text(alphabet="aB é_-.,7中あไ\n\u0301", max_size=40)


def test_case_signs_and_spacing_do_not_count():
    assert words.split("Hello,  WORLD! snake_case x86-64\n") == ["hello", "world", "snake", "case", "x86", "64"]
    assert list(words.hashes("Hello,  WORLD!")) == list(words.hashes("(hello) world"))


def test_scripts_without_spaces_have_one_word_a_character():
    assert words.split("中文 text あ") == ["中", "文", "text", "あ"]


def test_a_combining_mark_belongs_to_its_word():
    assert words.split("e\u0301te\u0301 हिन्दी") == ["e\u0301te\u0301", "हिन्दी"]


@given(LETTERS, LETTERS)
def test_hashes_are_equal_exactly_where_words_are(one, other):
    every = words.split(one) + words.split(other)
    hashed = [*words.hashes(one).tolist(), *words.hashes(other).tolist()]
    assert len(set(zip(every, hashed))) == len(set(every)) == len(set(hashed))


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_ngrams_are_equal_exactly_where_runs_of_words_are(numbers, length):
    vocabulary = words.hashes("a b ab ba")
    runs = [tuple(numbers[start : start + length]) for start in range(len(numbers) - length + 1)]
    hashed = words.ngrams(vocabulary[np.array(numbers, int)], length).tolist()
    assert len(hashed) == len(runs)
    assert len(set(zip(runs, hashed))) == len(set(runs)) == len(set(hashed))


def test_shingles_are_a_sorted_set_and_a_short_text_is_one():
    shingles = words.shingles(words.hashes("to be or not to be or not"), 4)
    assert list(shingles) == sorted(set(shingles.tolist())) and len(shingles) == 4  # 5 runs, one of them twice
    assert len(words.shingles(words.hashes("too short"), 5)) == 1
    assert len(words.shingles(words.hashes("..."), 5)) == 0


def test_no_two_words_of_the_standard_library_collide():
    from llama4_jax.data import text

    seen = collections.defaultdict(set)
    for source in text.sources("code", "heldout"):
        document = source.read()
        for word, hashed in zip(words.split(document), words.hashes(document).tolist()):
            seen[hashed].add(word)
    assert len(seen) > 3000
    assert all(len(spelled) == 1 for spelled in seen.values())
