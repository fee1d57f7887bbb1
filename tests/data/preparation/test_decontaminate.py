"""Leaks of evaluation items: as long as needed and no longer, and phrases that everybody uses are none."""

import json

import numpy as np
import pytest

from llama4_jax.data.preparation import decontaminate, truth, words
from llama4_jax.data.preparation.decontaminate import Overlap

OVERLAP = Overlap()
QUESTION = "Which of the seven bridges must a walker cross twice before the evening bells of the old town ring?"


def leaks(texts, items, overlap=OVERLAP):
    forbidden = decontaminate.forbid(items, overlap)
    found, common = decontaminate.leaks([forbidden.hits(words.hashes(text)) for text in texts], forbidden, overlap)
    assert ((found >= 0) == truth.giveaways(texts, items, overlap)).all()  # words compared themselves say the same
    return found.tolist(), common


def test_thirteen_shared_words_are_a_leak_and_twelve_are_not():
    split = words.split(QUESTION)
    texts = [f"so {' '.join(split[3 : 3 + length])} then" for length in (12, 13, 14)]
    assert leaks(texts, {"q": QUESTION}) == ([-1, 0, 0], 0)


def test_case_and_signs_hide_no_leak():
    assert leaks([QUESTION.upper().replace(" ", " - ")], {"other": "x " * 20, "q": QUESTION})[0] == [1]


def test_a_short_item_is_looked_for_as_a_whole_and_a_very_short_one_not():
    items = {"eight": "how many angels dance on one sharp pin", "seven": "how many angels dance on one pin"}
    texts = ["Well, how many angels dance on one sharp pin? Nobody knows.", "how many angels dance on one pin"]
    assert leaks(texts, items)[0] == [0, -1]
    assert decontaminate.forbid(items, OVERLAP).unchecked == 1


@pytest.mark.parametrize(("copies", "leaking"), [(10, True), (11, False)])
def test_an_ngram_in_more_than_ten_documents_is_no_leak(copies, leaking):
    texts = [f"document {number}: {QUESTION}" for number in range(copies)] + ["something else"]
    found, common = leaks(texts, {"q": QUESTION})
    assert found == [0 if leaking else -1] * copies + [-1]
    assert (common > 0) == (not leaking)


def test_random_texts_and_items_agree_with_comparing_words():
    draw = np.random.default_rng(0)
    spell = lambda size: " ".join(f"w{i}" for i in draw.integers(0, 3, size))  # noqa: E731
    items = {f"item {i}": spell(size) for i, size in enumerate(draw.integers(2, 9, 40))}
    found, _ = leaks([spell(30) for _ in range(60)], items, Overlap(words=6, min_words=4, common_after=3))
    assert 5 < sum(item >= 0 for item in found) < 55


def test_items_are_read_from_text_and_from_lines_of_json(tmp_path):
    (tmp_path / "a.txt").write_text("all of it\n\nis one")
    lines = [{"question": "Q", "answer": "A", "id": 7}, {"question": "R", "answer": "B"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert decontaminate.read_items(tmp_path / "a.txt") == {"a.txt": "all of it\n\nis one"}
    assert decontaminate.read_items(tmp_path / "b.jsonl") == {"b.jsonl:1": "Q\nA", "b.jsonl:2": "R\nB"}
    assert decontaminate.read_items(tmp_path / "b.jsonl", ["answer"]) == {"b.jsonl:1": "A", "b.jsonl:2": "B"}
    with pytest.raises(ValueError, match=r"b.jsonl:1: wanted text in \['text'\], got \['answer', 'id', 'question'\]"):
        decontaminate.read_items(tmp_path / "b.jsonl", ["text"])


def test_lengths_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match="min_words=14, words=13"):
        Overlap(min_words=14)
