"""Running text of a manual page: its roff source without the marking-up.

Requests and macros that set text keep their words (headings, bold and italic lines, items); the others, comments,
definitions, conditions and tables' formats go. Escapes become the characters that they stand for, or nothing. This reads
what manual pages use and is no typesetter: pages built from their own macros lose what those would have printed.

Source: groff_man(7), groff_char(7), mdoc(7).
"""

from __future__ import annotations

import re
import unicodedata

# Macros whose arguments are words of the page; after man(7) and mdoc(7).
_WITH_TEXT = frozenset(
    "SH SS B I R BR RB BI IB IR RI SM SB TP IP TQ HP OP Sh Ss Nd Nm Fl Ar Op Cm Ic Li Pa Ev Em Sy Ql Dq Sq Qq Pq Xr It "
    "Fn Fa Va Vt Dv Er Tn Ta".split()
)
_HEADINGS = frozenset(("SH", "SS", "Sh", "Ss"))
_BREAKS = frozenset("PP LP P TP IP HP Pp sp br nf fi EX EE RS RE Bl El Bd Ed It".split())
_OPENS_BLOCK = {"de": "..", "de1": "..", "am": "..", "ig": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}
_CHARACTERS = {
    **{"lq": "“", "rq": "”", "oq": "‘", "cq": "’", "aq": "'", "dq": '"', "em": "—", "en": "–", "bu": "•", "hy": "-"},
    **{"co": "©", "rg": "®", "tm": "™", "->": "→", "<-": "←", "ha": "^", "ti": "~", "mu": "×", "+-": "±", "de": "°"},
    **{"rs": "\\", "ga": "`", "Fo": "«", "Fc": "»", "<=": "≤", ">=": "≥", "!=": "≠", "ss": "ß", "mc": "µ", "or": "|"},
}
# The first sign of a letter's name, as in \\(:o for ö, and the combining mark that it stands for.
_ACCENTS = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ",": "\u0327", "v": "\u030c"}
_LETTERS = {
    "oa": "å",
    "oA": "Å",
    "/o": "ø",
    "/O": "Ø",
    "/l": "ł",
    "/L": "Ł",
    "ae": "æ",
    "AE": "Æ",
    "oe": "œ",
    "OE": "Œ",
}
_STRINGS = {"Aq": "'", "lq": "“", "rq": "”", "C'": "'", "C`": "`", 'L"': '"', 'R"': '"', "--": "—", "R": "®", "Tm": "™"}
_ESCAPE = re.compile(
    r"""\\(?:
    (?P<comment>["\#].*) |
    \*\((?P<string>..) | \*\[(?P<named_string>[^\]]*)\] | \*(?P<short_string>.) |
    \((?P<character>..) | \[(?P<named>[^\]]*)\] |
    [fFgkmMnsVYE](?:\([^\s]{2}|\[[^\]]*\]|[+-]?\d|.) | [bChDHlLNoRSvwXxZ]'[^']*' |
    (?P<plain>.)|$)""",
    re.VERBOSE,
)
_PLAIN = {"-": "-", "e": "\\", "\\": "\\", "~": " ", " ": " ", "0": " ", "'": "'", "`": "`", ".": ".", "t": "\t"}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')


def plain(source: str) -> str:
    """The words of a page, a line for each line of its source and a blank line where paragraphs begin."""
    lines: list[str] = []
    until = None
    for line in source.splitlines():
        if until:
            until = None if line.rstrip() == until else until
        elif line.startswith((".", "'")):
            macro, _, rest = line[1:].strip().partition(" ")
            until = _OPENS_BLOCK.get(macro)
            _macro(lines, macro, rest)
        else:
            lines.append(unescape(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def unescape(line: str) -> str:
    """`line` with its escapes replaced by what they print."""
    return _ESCAPE.sub(_printed, line)


def _macro(lines: list[str], macro: str, rest: str) -> None:
    if macro in _HEADINGS or macro in _BREAKS:
        lines.append("")
    if macro not in _WITH_TEXT or not rest:
        return
    words = [quoted.replace('""', '"') or plain for quoted, plain in _ARGUMENT.findall(rest)]
    if macro in ("IP", "TP", "HP"):
        words = words[:1] if macro == "IP" else []  # what follows is an indentation
    # Alternating faces, as in .BR, print their arguments without a space between.
    alternating = len(macro) == 2 and set(macro) <= set("BIR")
    lines.append(unescape(("" if alternating else " ").join(words)))


def _printed(match: re.Match) -> str:
    kind = match.lastgroup
    if kind is None or kind == "comment":
        return ""
    name = match[kind]
    if kind == "plain":
        return _PLAIN.get(name, "")
    if kind.endswith("string"):
        return _STRINGS.get(name, "")
    if re.fullmatch(r"u[0-9A-F]{4,6}", name):
        return chr(int(name[1:], 16))
    if len(name) == 2 and name[0] in _ACCENTS and name[1].isalpha():
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    return _CHARACTERS.get(name) or _LETTERS.get(name, "")
