r"""Cuts a long text into parts that encode, one after the other, to what the whole text encodes to.

A cut changes nothing where no match of the split pattern (`bpe.SPLIT_PATTERN`) reaches over it and none before it looks
ahead over it. The pattern never looks back, so what follows a cut cannot notice it. Its alternatives are words (1, 2),
numbers (3), signs with the newlines and slashes behind them (4), space that ends in newlines (5), and other space
(6, 7); only 6 looks ahead, to leave the last space before a word to that word. Three kinds of places are safe:

* behind a newline, before anything but space and slash. Newlines occur in alternatives 4 to 7 only; 4 continues with a
  newline or slash, 5 to 7 with space, so none reaches over. Space that ends at the cut ends in a newline, so 5 takes
  all of it before 6 is asked, with or without the text behind the cut.
* behind a letter or number, before a listed sign or space. Within a match, only letters, marks and the apostrophe of a
  contraction follow a letter, only numbers follow a number, and none of these is listed. No space ends at the cut, so 6
  is not concerned. Signs are listed one by one: classes of characters differ between versions of Unicode.
* between an ASCII letter and an ASCII digit, for the same reasons.

A text without such a place for long is one word, one row of signs or one stretch of space. Merging it takes more than
linear time, and the pattern's matcher overflows its stack, for example on 700,000 spaces. Such a text is cut by force
after `WINDOW + LONGEST` characters, and only there may tokens differ from those of the whole. ASCII digits are then cut
between their groups of three, which changes nothing.

Source: our own; the published tokenizer cuts by force too, after 25,000 characters with or without space, and after
every 400,000 characters of any text, which changes tokens there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

WINDOW = 16_384  # characters in a part before a border is looked for
LONGEST = 100_000  # characters after them in which one must appear

_SIGNS = ' \t\r\n!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~。，、！？：；（）「」'
_BORDER = re.compile(rf"[\r\n](?=[^\s/])|[^\W_](?=[{re.escape(_SIGNS)}])|[0-9](?=[A-Za-z])|[A-Za-z](?=[0-9])")
_GROUP = 3  # digits that the split pattern takes at a time


def parts(text: str, window: int = WINDOW, longest: int = LONGEST) -> Iterator[str]:
    """Parts of `text`, each at most `window + longest` characters, that make it up again; none is empty.

    window: characters (at least 1) after which the next safe place ends a part; longest: where to give up and cut by
    force, counted from there.
    """
    start = 0
    while len(text) - start > window:
        limit = start + window + longest
        border = _BORDER.search(text, start + window - 1, limit)
        end = border.end() if border else _forced(text, start, limit)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _forced(text: str, start: int, limit: int) -> int:
    """The end of a part without a safe place: `limit`, or a little before it among digits, or the text's end."""
    if limit >= len(text):
        return len(text)
    digits = limit - start - len(text[start:limit].rstrip("0123456789"))
    return max(limit - digits % _GROUP, start + 1)
