"""The endless stream of picture documents: which emoji comes when, in which languages, rendered how.

Everything is a function of (seed, position), so any position can be made again at no cost of memory: that is what makes
the loader's state a handful of numbers. An epoch asks for each trained (emoji, language) pair exactly once.
"""

from __future__ import annotations

import math

import numpy as np

from llama4_jax.config.data import DataConfig
from llama4_jax.data import emoji
from llama4_jax.data.documents import Document, PictureGrammar
from llama4_jax.data.draws import Draw, generator, shuffled
from llama4_jax.data.rendering import Renderer
from llama4_jax.tokenizer import Tokenizer


class Pictures:
    """Picture documents by position, 0, 1, 2, ... without end."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, rendering: Draw = Draw.TRAIN_RENDERING):
        """rendering: which of the two streams of renderings to show."""
        self.emoji = emoji.select(config.num_emoji, config.languages, config.emoji_seed)
        self.grammar = PictureGrammar(tokenizer, config.tokens_per_tile, config.prompt_weight, config.name_weight)
        self._config, self._rendering = config, rendering
        self._renderer = Renderer([entry.character for entry in self.emoji], config.image_size)
        self._languages = [_trained(config, entry) for entry in self.emoji]
        self._items = [  # (emoji, which of its groups of languages)
            (index, group)
            for index, languages in enumerate(self._languages)
            for group in range(math.ceil(len(languages) / config.names_per_image))
        ]

    @property
    def epoch(self) -> int:
        """Documents after which every trained pair has come once."""
        return len(self._items)

    def lines(self, position: int) -> list[tuple[str, str]]:
        """(language, name) asked for at `position`, in order."""
        epoch, index, group = self._item(position)
        size = self._config.names_per_image
        order = generator(self._config.seed, Draw.LANGUAGES, epoch, index).permutation(len(self._languages[index]))
        chosen = [self._languages[index][place] for place in order[group * size : (group + 1) * size]]
        return [(language, self.emoji[index].names[language]) for language in chosen]

    def document(self, position: int) -> Document:
        return self.grammar.document(self.lines(position), picture=position)

    def image(self, position: int) -> np.ndarray:
        """float32 [h w c] in [-1, 1]."""
        _, index, _ = self._item(position)
        rng = generator(self._config.seed, self._rendering, position)
        return self._renderer.render(self.emoji[index].character, rng)

    def _item(self, position: int) -> tuple[int, int, int]:
        """(epoch, emoji, group of languages) at `position`."""
        epoch, item = shuffled(position, len(self._items), self._config.seed)
        return epoch, *self._items[item]


def written_names(config: DataConfig) -> list[str]:
    """Every name that training asks for, as documents write it: "English: red apple", newline included."""
    return [
        f"{emoji.LANGUAGES[language]}: {entry.names[language]}\n"
        for entry in emoji.select(config.num_emoji, config.languages, config.emoji_seed)
        for language in _trained(config, entry)
    ]


def _trained(config: DataConfig, entry: emoji.Emoji) -> list[str]:
    """The languages in which training asks for this emoji's name."""
    share = config.heldout_pairs
    return [code for code in config.languages if not emoji.is_held_out(entry.character, code, share)]
