"""Asking a model for names: batches, accuracy by language, and the control with other pictures."""

import dataclasses

import numpy as np
import pytest

from llama4_jax import tokenizer
from llama4_jax.data.documents import PictureGrammar
from llama4_jax.data.heldout import Question
from llama4_jax.eval import naming
from llama4_jax.testing import tiny


def question(index: int, language: str = "en", name: str = "tree", prompt=(), answer=(1, 2, 3)) -> Question:
    """About emoji `index`, whose picture is of one grey."""
    return Question(
        index=index,
        character=chr(0x1F600 + index),
        language=language,
        name=name,
        image=np.full((16, 16, 3), index / 100, np.float32),
        prompt=np.array(prompt, np.int32),
        answer=np.array(answer, np.int32),
    )


def test_accuracy_is_the_share_of_exact_names_by_language_and_over_all():
    said = [("en", "tree"), ("en", "Tree"), ("en", "tree"), ("de", "tre"), ("de", "tree")]
    answers = [naming.Answer(question(i, language), name) for i, (language, name) in enumerate(said)]
    assert naming.accuracy(answers) == pytest.approx({"all": 3 / 5, "en": 2 / 3, "de": 1 / 2})


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_pictures_are_all_there_and_none_is_of_the_emoji_asked_for(seed):
    asked = [question(index) for index in (0, 0, 0, 1, 1, 2, 3, 3, 3, 3)]
    shown = naming.shuffled(asked, seed)
    assert shown.shape == (10, 16, 16, 3)
    greys = np.round(100 * shown[:, 0, 0, 0]).astype(int)
    assert sorted(greys) == [q.index for q in asked]
    assert all(grey != q.index for grey, q in zip(greys, asked))


def test_the_shuffle_is_drawn_from_its_seed():
    asked = [question(index) for index in range(10)]
    first, again, other = (naming.shuffled(asked, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_pictures_of_one_emoji_alone_cannot_be_shuffled():
    with pytest.raises(ValueError, match="more than half"):
        naming.shuffled([question(0), question(0), question(1)], seed=0)


@pytest.fixture(scope="module")
def grammar(tmp_path_factory) -> PictureGrammar:
    path = tmp_path_factory.mktemp("naming") / "tokenizer.model"
    return PictureGrammar(tokenizer.train(["English: tree\nDeutsch: baum\n"] * 9, 280, path), tokens_per_tile=4)


@pytest.fixture(scope="module")
def asked(grammar) -> list[Question]:
    """Three questions of two prompt lengths; answers of at most five tokens."""
    pairs = [(0, "en"), (30, "de"), (90, "en")]
    return [
        question(index, language, prompt=grammar.opening + grammar.asks(language), answer=(1,) * (3 + index // 45))
        for index, language in pairs
    ]


@pytest.fixture(scope="module")
def model(grammar):
    patch = grammar.opening[3]
    return tiny.model(tiny.vision_config(num_layers=2, vocab_size=280, patch_token=patch), seed=1)


def said(answers: list[naming.Answer]) -> list[str]:
    return [answer.said for answer in answers]


def test_answers_do_not_depend_on_the_batch_they_were_asked_in(model, grammar, asked):
    """Three questions in batches of two: the last one stands beside a copy of itself."""
    answers = naming.ask(model, grammar, asked, batch_size=2)
    assert [answer.question for answer in answers] == asked
    assert said(answers) == said(naming.ask(model, grammar, asked[::-1], batch_size=2))[::-1]
    assert len(set(said(answers))) > 1
    assert naming.accuracy(answers)["all"] == 0
    told = [dataclasses.replace(q, name=name) for q, name in zip(asked, said(answers))]
    assert naming.accuracy(naming.ask(model, grammar, told, batch_size=2)) == {"all": 1, "en": 1, "de": 1}


def test_given_pictures_take_the_place_of_the_questions_own(model, grammar, asked):
    swapped = np.stack([asked[2].image, asked[1].image, asked[0].image])
    found = naming.ask(model, grammar, asked, swapped, batch_size=2)
    exchanged = [dataclasses.replace(q, image=image) for q, image in zip(asked, swapped)]
    assert said(found) == said(naming.ask(model, grammar, exchanged, batch_size=2))
    assert said(found) != said(naming.ask(model, grammar, asked, batch_size=2))
