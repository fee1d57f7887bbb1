"""Special tokens: which exist, and in which order their ids follow the base vocabulary.

A special token is written `<|name|>` and keyed here by its bare name. Two tables exist:
* the published Llama 4 table of 2,048 tokens, for the published base vocabulary of 200,000;
* a short table with the tokens that this project uses, in the same order, for vocabularies trained here.

Source: the Llama 4 model card's prompt format and the published tokenizer (ids 200000 to 202047).
"""

from __future__ import annotations

LLAMA4_BASE = 200_000  # ranks in the published Llama 4 vocabulary
LLAMA4_SPECIAL = 2_048  # special tokens after them

# The tokens in use, in the order of their Llama 4 ids.
USED = (
    "begin_of_text",
    "end_of_text",
    "header_start",
    "header_end",
    "eom",
    "eot",
    "finetune_right_pad",
    "image_start",
    "image_end",
    "tile_x_separator",
    "tile_y_separator",
    "image",
    "patch",
)


def names(base: int) -> tuple[str, ...]:
    """Bare names of the special tokens that follow `base` ordinary ones; the first has id `base`."""
    return _llama4() if base == LLAMA4_BASE else USED


def spelling(name: str) -> str:
    """How the token is written in text: `eot` is `<|eot|>`."""
    return f"<|{name}|>"


def _llama4() -> tuple[str, ...]:
    """The published table. Reserved names count on within a group; numbers 6 and 7 of post-training went to Python."""
    reserved = "reserved_special_token"
    text = [
        *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
        *("header_start", "header_end", "eom", "eot", "step"),
        *_numbered(f"text_post_train_{reserved}", 0, 6),
        *("python_start", "python_end", "finetune_right_pad"),
        *_numbered(f"text_post_train_{reserved}", 8, 69),
    ]
    vision = [
        *("image_start", "image_end"),
        *_numbered(f"vision_{reserved}", 0, 2),
        *("tile_x_separator", "tile_y_separator"),
        *_numbered(f"vision_{reserved}", 2, 6),
        "image",
        *_numbered(f"vision_{reserved}", 6, 7),
        "patch",
        *_numbered(f"vision_{reserved}", 7, 1048),
    ]
    reasoning = [*_numbered(f"reasoning_{reserved}", 0, 8), "reasoning_thinking_start", "reasoning_thinking_end"]
    used = len(text) + len(vision) + len(reasoning)
    return (*text, *vision, *reasoning, *_numbered(reserved, 0, LLAMA4_SPECIAL - used))


def _numbered(stem: str, start: int, stop: int) -> list[str]:
    return [f"{stem}_{number}" for number in range(start, stop)]
