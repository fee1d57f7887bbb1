"""What a model is trained on, and how it is laid out in batches."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A stream of batches of pictures with their names, and text in the room that they leave."""

    seed: int = 0  # of order, languages and rendering; not of what is held out
    rows: int = 8  # sequences in a batch
    sequence_length: int = 256  # positions in a row
    images_per_batch: int = 72  # pictures in every batch; 0: text alone
    image_size: int = 48  # side of a picture, pixels; one tile
    tokens_per_tile: int = 9  # placeholders of one picture: VisionConfig.tokens_per_tile
    num_emoji: int = 320  # pictures to name
    emoji_seed: int = 0  # of which emoji those are; apart from `seed`, so that runs stay comparable
    languages: tuple[str, ...] = ("en", "de", "es", "ru")  # codes as in data.emoji.LANGUAGES
    names_per_image: int = 2  # languages asked of one picture, at most; the first alone is pure seeing
    heldout_pairs: float = 0.05  # share of (emoji, language) pairs never trained on
    prompt_weight: float = 0.0  # loss weight of the words that ask for a name; placeholders always have 0
    name_weight: float = 1.0  # loss weight of names and of the token that ends each
    text_weight: float = 1.0  # loss weight of running text
    code_share: float = 0.5  # share of the text's tokens that is source code; the rest is documentation
    min_text: int = 16  # shortest piece of text worth placing, tokens; smaller room stays padding
    prefetch: int = 0  # batches prepared ahead by a thread; 0: prepared when asked for

    def __post_init__(self):
        for name in ("rows", "sequence_length", "image_size", "tokens_per_tile", "names_per_image", "min_text"):
            if getattr(self, name) < 1:
                raise ValueError(f"DataConfig.{name}={getattr(self, name)} must be at least 1")
        for name in ("images_per_batch", "prompt_weight", "name_weight", "text_weight", "prefetch", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"DataConfig.{name}={getattr(self, name)} must not be negative")
        for name in ("heldout_pairs", "code_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"DataConfig.{name}={getattr(self, name)} is a share, from 0 to 1")
        if self.heldout_pairs == 1:
            raise ValueError("DataConfig.heldout_pairs=1 leaves no pair to train on; use a smaller share")
        if self.images_per_batch and not (self.num_emoji and self.languages):
            raise ValueError(
                f"images_per_batch={self.images_per_batch} with num_emoji={self.num_emoji} and "
                f"languages={self.languages}: there is nothing to name; set all three or images_per_batch=0"
            )
        if self.names_per_image > max(len(self.languages), 1):
            raise ValueError(
                f"names_per_image={self.names_per_image} exceeds the {len(self.languages)} languages; "
                f"use at most {len(self.languages)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedConfig:
    """A stream of batches of prepared text, from one folder or from several in fixed shares."""

    folders: tuple[str, ...]  # of `experiments.prepare_text`
    weights: tuple[float, ...] = ()  # of each folder's tokens in the stream; only proportions count; none: all alike
    rows: int = 256  # sequences in a batch, over all processes
    sequence_length: int = 8192  # positions in a row
    seed: int = 0  # of the order of rows
    prefetch: int = 2  # batches prepared ahead by a thread; 0: prepared when asked for

    def __post_init__(self):
        if not self.folders:
            raise ValueError(
                "PreparedConfig.folders names no folder; prepare one with `python -m experiments.prepare_text`"
            )
        if self.weights and (len(self.weights) != len(self.folders) or not min(self.weights) > 0):
            raise ValueError(
                f"PreparedConfig.weights={self.weights}: wanted a positive number for each of {len(self.folders)} folders; "
                "leave out folders that are not wanted"
            )
        for name, least in (("rows", 1), ("sequence_length", 1), ("seed", 0), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"PreparedConfig.{name}={getattr(self, name)} must be at least {least}")
