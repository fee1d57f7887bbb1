"""What one training document looks like: token by token, with the weight of each prediction.

A picture document is

    <|begin_of_text|><|image_start|><|image|> n x <|patch|> <|image_end|>English: red apple
    Deutsch: roter apfel<|eot|>

with as many lines as names are asked for. The newline or <|eot|> after a name belongs to it: the model has to know where
a name ends. A text document is <|begin_of_text|>, the text, <|end_of_text|>, and may be packed in several pieces.

Source: the image grammar of the Llama 4 prompt format, for one tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from llama4_jax.data import emoji
from llama4_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A run of positions that attend only to each other.

    inputs, targets: int32 [n]; targets[i] is the token that follows inputs[i].
    weights: float32 [n], of the loss at each target.
    picture: which picture fills the placeholders among `inputs`; None without placeholders.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    picture: int | None = None

    def __len__(self) -> int:
        return len(self.inputs)


class PictureGrammar:
    """Writes picture documents, and reads the names that a model answers with."""

    def __init__(
        self, tokenizer: Tokenizer, tokens_per_tile: int, prompt_weight: float = 0.0, name_weight: float = 1.0
    ):
        self._tokenizer = tokenizer
        self._weights = (prompt_weight, name_weight)
        self._encode = functools.cache(tokenizer.encode)  # the few names and labels, over and over
        special = tokenizer.special
        patches = [special["patch"]] * tokens_per_tile
        self.opening = [tokenizer.bos, special["image_start"], special["image"], *patches, special["image_end"]]
        (self._newline,) = tokenizer.encode("\n")
        self.eot = special["eot"]

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a name: generation may stop at any of them."""
        return (self._newline, *self._tokenizer.stop)

    def asks(self, language: str) -> list[int]:
        """Tokens that ask for the name in `language`, by code: "English:"."""
        return self._encode(f"{emoji.LANGUAGES[language]}:")

    def says(self, name: str) -> list[int]:
        """Tokens of the name as an answer, without the token that ends it: " red apple"."""
        return self._encode(f" {name}")

    def document(self, lines: Sequence[tuple[str, str]], picture: int) -> Document:
        """One picture and its names; lines: (language code, name) from first to last."""
        prompt_weight, name_weight = self._weights
        tokens, weights = list(self.opening), [0.0] * len(self.opening)
        for number, (language, name) in enumerate(lines, start=1):
            asks, says = self.asks(language), self.says(name)
            tokens += [*asks, *says, self.eot if number == len(lines) else self._newline]
            weights += [prompt_weight] * len(asks) + [name_weight] * (len(says) + 1)
        tokens = np.array(tokens, np.int32)
        return Document(tokens[:-1], tokens[1:], np.array(weights[1:], np.float32), picture)

    def read(self, tokens: Iterable[int]) -> str:
        """The name in what a model generated: the text before the first token that ends a name."""
        name = []
        for token in tokens:
            if token in self.ends:
                break
            name.append(int(token))
        return self._tokenizer.decode(name).strip()


def check_images(tokens: np.ndarray, num_tiles: int, patch_token: int, tokens_per_tile: int) -> None:
    """Raises ValueError unless `tokens` [...] have a placeholder for each feature of `num_tiles` tiles and no more."""
    placeholders = int(np.count_nonzero(tokens == patch_token))
    if placeholders != num_tiles * tokens_per_tile:
        raise ValueError(
            f"the tokens hold {placeholders} <|patch|> placeholders, but {num_tiles} tiles of {tokens_per_tile} "
            f"features fill {num_tiles * tokens_per_tile}; give one run of {tokens_per_tile} placeholders a tile"
        )
