"""Document grammar and packing, on examples small enough to read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.data import packing
from llama4_jax.data.documents import Document, PictureGrammar, check_images


def _document(first, length, picture=None):
    """Tokens first, first + 1, ... with the last one only a target."""
    tokens = np.arange(first, first + length + 1, dtype=np.int32)
    return Document(tokens[:-1], tokens[1:], np.full(length, first, np.float32), picture)


def test_a_picture_document_reads_as_documented(tok):
    grammar = PictureGrammar(tok, tokens_per_tile=2)
    document = grammar.document([("en", "red apple"), ("de", "roter apfel")], picture=5)
    assert tok.decode([*document.inputs, document.targets[-1]]) == (
        "<|begin_of_text|><|image_start|><|image|><|patch|><|patch|><|image_end|>"
        "English: red apple\nDeutsch: roter apfel<|eot|>"
    )
    assert list(document.inputs[1:]) == list(document.targets[:-1])
    assert document.picture == 5


def test_only_names_and_what_ends_them_are_learned(tok):
    document = PictureGrammar(tok, tokens_per_tile=2).document([("en", "cat"), ("de", "katze")], picture=0)
    assert tok.decode(document.targets[document.weights > 0]) == " cat\n katze<|eot|>"
    weighed = PictureGrammar(tok, 2, prompt_weight=0.25, name_weight=2.0).document([("en", "cat")], picture=0)
    assert tok.decode(weighed.targets[weighed.weights == 0.25]) == "English:"
    assert tok.decode(weighed.targets[weighed.weights == 2]) == " cat<|eot|>"
    assert (
        tok.decode(weighed.targets[weighed.weights == 0]) == "<|image_start|><|image|><|patch|><|patch|><|image_end|>"
    )


def test_an_answer_ends_at_a_newline_or_at_the_end_of_turn(tok):
    grammar = PictureGrammar(tok, tokens_per_tile=2)
    says = grammar.says("roter apfel")
    for end in grammar.ends:
        assert grammar.read([*says, end, *tok.encode("Deutsch: x")]) == "roter apfel"
    assert grammar.read(says) == "roter apfel"


def test_placeholders_that_do_not_match_the_tiles_are_refused_with_both_numbers():
    tokens = np.array([[9, 9, 9, 1], [1, 9, 9, 9]])
    check_images(tokens, num_tiles=2, patch_token=9, tokens_per_tile=3)
    with pytest.raises(ValueError, match="hold 6 .* but 3 tiles of 3 features fill 9"):
        check_images(tokens, num_tiles=3, patch_token=9, tokens_per_tile=3)


def test_rows_are_laid_out_with_segments_and_restarting_positions():
    rows = [[_document(10, 3), _document(20, 2)], [_document(30, 4)]]
    batch = packing.arrays(rows, length=6)
    assert batch["tokens"].tolist() == [[10, 11, 12, 20, 21, 0], [30, 31, 32, 33, 0, 0]]
    assert batch["targets"].tolist() == [[11, 12, 13, 21, 22, 0], [31, 32, 33, 34, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch["loss_weights"].tolist() == [[10, 10, 10, 20, 20, 0], [30, 30, 30, 30, 0, 0]]


def test_documents_go_where_they_fit_best_and_pictures_are_listed_as_they_appear():
    documents = [_document(0, length, picture) for picture, length in enumerate([3, 5, 4, 6, 2])]
    rows, left = packing.fit(documents, rows=2, length=10)
    # Longest first: 6 | 5 -> 6 4 | 5 -> 6 4 | 5 3 -> 6 4 | 5 3 2
    assert [[len(document) for document in row] for row in rows] == [[6, 4], [5, 3, 2]]
    assert packing.pictures(rows) == [3, 2, 1, 0, 4] and not left


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="12 positions does not fit sequence_length=10; use sequence_length >= 12"):
        packing.fit([_document(0, 12)], rows=2, length=10)


def test_text_fills_the_room_left_unless_the_piece_would_be_too_short():
    rows = [[_document(0, 5)], [_document(0, 8)], []]
    packing.fill(rows, 10, lambda room: _document(50, min(room, 7)), shortest=3)
    # 5 free: one piece; 2 free: too short; 10 free: pieces of 7 and 3.
    assert [[len(document) for document in row] for row in rows] == [[5, 5], [8], [7, 3]]


@given(lengths=st.lists(st.integers(1, 20), max_size=30), rows=st.integers(1, 6))
def test_packing_neither_loses_nor_repeats_a_token(lengths, rows):
    documents = [_document(1000 * (number + 1), length, number) for number, length in enumerate(lengths)]
    placed, left = packing.fit(documents, rows, length=20)
    batch = packing.arrays(placed, length=20)
    used = batch["segments"] > 0
    expected = [token for document in documents for token in document.inputs if document not in left]
    assert sorted(batch["tokens"][used]) == sorted(expected)
    assert np.array_equal(batch["targets"][used], batch["tokens"][used] + 1)
    assert sorted(packing.pictures(placed) + [document.picture for document in left]) == list(range(len(lengths)))
    # Nothing is left while there is room for it.
    free = 20 - used.sum(axis=1).max(initial=0) if not left else 20 - used.sum(axis=1)
    assert all(len(document) > np.max(free) for document in left)
