"""The tokens that stand for one picture in a text.

One tile is `<|image_start|><|image|>`, its patches, `<|image_end|>`. More are, row by row, the patches of each tile with
`<|tile_x_separator|>` between tiles and `<|tile_y_separator|>` after each row, then `<|image|>` and the patches of the
whole picture in small.

Source: the image grammar of the Llama 4 prompt format.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama4_jax.tokenizer import bpe


def write(tok: bpe.Tokenizer, rows: int, columns: int, tokens_per_tile: int) -> list[int]:
    """Ids of a picture of `rows` x `columns` tiles, each with `tokens_per_tile` placeholders (144 for 336 pixels).

    Raises ValueError for a number below 1.
    """
    if min(rows, columns, tokens_per_tile) < 1:
        raise ValueError(
            f"a picture of {rows} x {columns} tiles of {tokens_per_tile} tokens: wanted at least 1 of each; "
            "give the (rows, columns) that the picture was cut into"
        )
    special = tok.special
    patches = [special["patch"]] * tokens_per_tile
    tiles: list[int] = []
    if rows * columns > 1:
        row = [*patches, *([special["tile_x_separator"], *patches] * (columns - 1)), special["tile_y_separator"]]
        tiles = row * rows
    return [special["image_start"], *tiles, special["image"], *patches, special["image_end"]]


def read(tok: bpe.Tokenizer, tokens: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the picture that `tokens`, from image_start to image_end, stand for.

    Raises ValueError when they are not what `write` gives for any picture.
    """
    tokens = list(tokens)
    count = {name: tokens.count(tok.special[name]) for name in ("patch", "tile_x_separator", "tile_y_separator")}
    rows = max(count["tile_y_separator"], 1)
    columns = count["tile_x_separator"] // rows + 1
    tiles = rows * columns + (count["tile_y_separator"] > 0)
    per_tile = count["patch"] // tiles
    if per_tile < 1 or tokens != write(tok, rows, columns, per_tile):
        raise ValueError(
            f"{len(tokens)} tokens between <|image_start|> and <|image_end|> are no picture: {count['patch']} patches, "
            f"{count['tile_x_separator']} and {count['tile_y_separator']} separators of columns and rows, in this order; "
            "encode the picture anew"
        )
    return rows, columns
