"""Does the model see? It is shown held-out renderings and asked for their names; a name counts only if it is exact.

The control shuffles the pictures between the questions: a model that guesses without looking scores the same on both.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from llama4_jax import infer
from llama4_jax.data.documents import PictureGrammar
from llama4_jax.data.heldout import Question
from llama4_jax.model import Llama4


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the model said to a question."""

    question: Question
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.question.name


def ask(
    model: Llama4,
    grammar: PictureGrammar,
    questions: Sequence[Question],
    images: np.ndarray | None = None,
    *,
    batch_size: int = 128,
) -> list[Answer]:
    """Greedy answers; `images` [n h w c] takes the place of the questions' own pictures if given."""
    model = infer.prepare(model)
    longest = max(len(question.answer) for question in questions)
    answers = []
    for start in tqdm(range(0, len(questions), batch_size), desc="asking", unit="batch", leave=False):
        batch = list(questions[start : start + batch_size])
        shown = [q.image for q in batch] if images is None else list(images[start : start + batch_size])
        surplus = batch_size - len(batch)  # the last batch repeats a question, so that nothing is compiled twice
        said = infer.generate(
            model,
            [question.prompt for question in batch + batch[:1] * surplus],
            max_new_tokens=longest,
            images=np.stack(shown + shown[:1] * surplus),
            stop=grammar.ends,
        )
        answers += [Answer(question, grammar.read(tokens)) for question, tokens in zip(batch, said)]
    return answers


def accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of exact names, by language and over "all"."""
    right = collections.defaultdict(list)
    for answer in answers:
        right["all"].append(answer.right)
        right[answer.question.language].append(answer.right)
    return {name: float(np.mean(values)) for name, values in right.items()}


def shuffled(questions: Sequence[Question], seed: int) -> np.ndarray:
    """The questions' pictures in another order, in which no question keeps a picture of its own emoji."""
    rng, emoji = np.random.default_rng(seed), np.array([question.index for question in questions])
    if np.bincount(emoji).max() * 2 > len(emoji):
        raise ValueError("one emoji has more than half of the questions: its pictures cannot all go to others")
    order = rng.permutation(len(emoji))
    while (clashes := np.flatnonzero(emoji[order] == emoji)).size:
        others = rng.integers(len(emoji), size=clashes.size)
        for clash, other in zip(clashes, others):
            order[clash], order[other] = order[other], order[clash]
    return np.stack([questions[i].image for i in order])
