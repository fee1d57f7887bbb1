"""Questions to ask a trained model about pictures that it has not seen.

Renderings come from a stream of random numbers that training never touches: new size, place, angle and background.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator

import numpy as np

from llama4_jax.config.data import DataConfig
from llama4_jax.data import emoji
from llama4_jax.data.documents import PictureGrammar
from llama4_jax.data.draws import Draw, generator
from llama4_jax.data.rendering import Renderer
from llama4_jax.tokenizer import Tokenizer


class Pairs(enum.Enum):
    """Which (emoji, language) pairs to ask."""

    TRAINED = "trained"  # names seen in training, on other renderings
    UNTRAINED = "untrained"  # names never seen in training; the emoji itself was, in other languages


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A picture, and its name asked for in one language."""

    index: int  # of the emoji, in the order of `emoji.select`
    character: str
    language: str
    name: str  # the truth
    image: np.ndarray  # float32 [h w c] in [-1, 1]
    prompt: np.ndarray  # int32 [n], placeholders included
    answer: np.ndarray  # int32 [m], the name and <|eot|>


def questions(
    config: DataConfig, tokenizer: Tokenizer, pairs: Pairs = Pairs.TRAINED, renderings: int = 1
) -> Iterator[Question]:
    """Every such pair `renderings` times, each with a rendering of its own: emoji by emoji, language by language."""
    chosen = emoji.select(config.num_emoji, config.languages, config.emoji_seed)
    renderer = Renderer([entry.character for entry in chosen], config.image_size)
    grammar = PictureGrammar(tokenizer, config.tokens_per_tile)
    for index, entry in enumerate(chosen):
        for place, language in enumerate(config.languages):
            untrained = emoji.is_held_out(entry.character, language, config.heldout_pairs)
            if untrained != (pairs is Pairs.UNTRAINED):
                continue
            for repeat in range(renderings):
                rng = generator(config.seed, Draw.HELDOUT_RENDERING, index, place, repeat)
                yield Question(
                    index=index,
                    character=entry.character,
                    language=language,
                    name=entry.names[language],
                    image=renderer.render(entry.character, rng),
                    prompt=np.array(grammar.opening + grammar.asks(language), np.int32),
                    answer=np.array([*grammar.says(entry.names[language]), grammar.eot], np.int32),
                )
