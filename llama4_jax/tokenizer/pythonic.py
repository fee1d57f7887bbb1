"""Tool calls as a Python list of calls with keyword arguments: `[weather(city="SF"), time(zone="PST")]`.

Read through Python's own syntax tree, of which only literals are accepted, and never evaluated. Argument names that
Python cannot spell (`from`, `my-key`) are written in `**{"from": "a"}`; a plain `from="a"` is read as well.

Source: the pythonic calls of the Llama 4 prompt format.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import keyword
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_WORDS = {"true": True, "false": False, "null": None}  # JSON's spellings, which models mix in

_ESCAPE = "__as_name"  # behind a word that Python keeps for itself, while it is parsed as an argument's name
_RESERVED_NAME = re.compile(  # or a text in quotes, closed or not, to be passed over
    rf"""'(?:\\.|[^'\\])*'?|"(?:\\.|[^"\\])*"?|\b({"|".join(keyword.kwlist)})(?=\s*=[^=])""", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for: the tool's name, and its arguments, by name, as JSON values."""

    name: str
    arguments: dict[str, Any]


def read(text: str) -> tuple[ToolCall, ...]:
    """The calls in a list of calls; none for a list of other things.

    Raises ValueError or SyntaxError for what is no such list, and RecursionError or MemoryError for one nested too
    deeply for Python's parser.
    """
    tree = _parsed(text)
    if not isinstance(tree, ast.List):
        raise ValueError("it is no list of calls")
    if not any(isinstance(element, ast.Call) for element in tree.elts):
        return ()
    return tuple(_call(element) for element in tree.elts)


def write(calls: Iterable[ToolCall]) -> str:
    """The list of calls that `read` reads back. Arguments must be JSON values.

    Raises ValueError for a tool's name that is no Python name.
    """
    return f"[{', '.join(_written(call) for call in calls)}]"


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        escaped = _RESERVED_NAME.sub(lambda found: found[1] + _ESCAPE if found[1] else found[0], text)
        if escaped == text:
            raise
        return ast.parse(escaped, mode="eval").body


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call):
        raise ValueError(f"the list holds a {type(node).__name__} beside calls")
    name = _dotted(node.func)
    if node.args:
        raise ValueError(f"{name} has arguments without a name")
    arguments: dict[str, Any] = {}
    for argument in node.keywords:
        value = _value(argument.value)
        if argument.arg is None and not isinstance(value, dict):
            raise ValueError(f"{name} has ** before something that is no dict")
        more = value if argument.arg is None else {argument.arg.removesuffix(_ESCAPE): value}
        twice = arguments.keys() & more.keys()
        if twice:
            raise ValueError(f"{name} has the argument {min(twice)!r} twice")
        arguments |= more
    return ToolCall(name, arguments)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError(f"a {type(node).__name__} is called, which has no name")


def _value(node: ast.expr | None) -> Any:
    """The JSON value that a literal stands for; a tuple becomes a list."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id="true" | "false" | "null" as word):
            return _WORDS[word]
    raise ValueError(f"a {type(node).__name__} is no literal that JSON can hold")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a dict has a key that is no text")


def _written(call: ToolCall) -> str:
    if not all(_is_name(part) for part in call.name.split(".")):
        raise ValueError(f"{call.name!r} is no Python name; use style='json'")
    named = [f"{name}={_literal(value)}" for name, value in call.arguments.items() if _is_name(name)]
    others = {name: value for name, value in call.arguments.items() if not _is_name(name)}
    return f"{call.name}({', '.join(named + [f'**{_literal(others)}'] * bool(others))})"


def _literal(value: Any) -> str:
    """Python's spelling of a JSON value. JSON's escapes in a text mean the same in Python."""
    match value:
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return repr(value)


def _is_name(text: str) -> bool:
    """Whether `read` takes `text` for this very name: Python normalises names, and keeps some for itself."""
    kept = keyword.iskeyword(text) or text.endswith(_ESCAPE)
    return text.isidentifier() and not kept and unicodedata.normalize("NFKC", text) == text
