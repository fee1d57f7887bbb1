"""Tool calls in what a model says: read from text, and written as text.

Forms that are read, each with or without `<|python_start|>` and `<|python_end|>` around it and `<|eom|>` or `<|eot|>`
at the end:
* pythonic: `[weather(city="SF"), time(zone="PST")]`, the documented form;
* json: `{"type": "function", "name": "weather", "parameters": {"city": "SF"}}`, also without the type, with "arguments"
  for "parameters", nested under "function" as in the OpenAI form, in a list, or several one after the other;
* function: `<function=weather>{"city": "SF"}</function>`, one or more;
* the built-in form `brave_search.call(query="x")`, and code between `<|python_start|>` and `<|python_end|>`.

Reading never executes anything and never raises: what is no call, or a damaged one, stays text.

Source: the Llama 4 prompt format; Meta's and Hugging Face's chat formats. Meta's reader returns the first of several
calls, this one returns all.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llama4_jax.tokenizer import pythonic, special
from llama4_jax.tokenizer.pythonic import ToolCall

CODE = "code_interpreter"  # the tool that code between <|python_start|> and <|python_end|> is for

_MAX_CHARS = 1_000_000  # of a text in which calls are looked for
_MAX_STARTS = 32  # places in a text at which `split` looks for calls
_ENDS = tuple(special.spelling(name) for name in ("eom", "eot"))
_CODE_START, _CODE_END = special.spelling("python_start"), special.spelling("python_end")
_DECODER = json.JSONDecoder(parse_constant=lambda word: _refuse(f"{word} is not a JSON value"))
_BETWEEN = re.compile(r"[\s;]*")
_TAG = re.compile(r"<function=([^\s<>]+)>\s*")
_CLOSING = re.compile(r"\s*</function>\s*")
_BUILT_IN = re.compile(r"\w+\.call\(")
_START = re.compile(r"<function=|\{\s*\"|\[\s*[{\w]|" + re.escape(_CODE_START))


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a text holds: calls, or text.

    calls: all calls, in order. text: what is said beside them; without calls, the text itself without its end token.
    reason: why something that looks like a call is not one; None for calls and for plain text.
    """

    calls: tuple[ToolCall, ...]
    text: str
    reason: str | None = None


def parse(text: str) -> Parsed:
    """The calls that make up `text`, or the text and, where it looks like a call, the reason why it is none."""
    for end in _ENDS:
        if text.endswith(end):
            text = text.removesuffix(end)
            break
    if text.lstrip().startswith(_CODE_START):
        return _parse_span(text)
    calls, reason = _attempt(text)
    return Parsed(calls, "" if calls else text, reason)


def split(text: str) -> Parsed:
    """Like `parse`, but the calls may follow other text, which is returned beside them.

    For text that is known to end in calls: an answer that quotes a call at its end would be taken for one.
    """
    whole = parse(text)
    if whole.calls:
        return whole
    for number, found in enumerate(_START.finditer(text)):
        if number == _MAX_STARTS:
            break
        rest = parse(text[found.start() :])
        if rest.calls:
            return Parsed(rest.calls, text[: found.start()] + rest.text)
    return whole


def render(calls: list[ToolCall] | tuple[ToolCall, ...], style: str = "json") -> str:
    """The text of `calls` that `parse` reads back, in the style "json", "pythonic" or "function".

    Raises ValueError for no calls, an unknown style, arguments that JSON cannot hold, and a name that the style cannot
    spell.
    """
    if style not in _STYLES:
        raise ValueError(f"style={style!r} is none of {', '.join(map(repr, _STYLES))}")
    if not calls:
        raise ValueError("no calls to render; give at least one ToolCall")
    written = [_checked(call) for call in calls]
    return _STYLES[style](calls, written)


def from_openai(call: Mapping[str, Any]) -> ToolCall:
    """The call in an OpenAI-form entry of `tool_calls`; its arguments may be a JSON object or its text.

    Raises ValueError, naming what is wrong, for anything else.
    """
    try:
        return _from_object(call)
    except RecursionError as error:
        raise ValueError("the arguments of a call are nested too deeply for JSON; flatten them") from error


def to_openai(call: ToolCall) -> dict[str, Any]:
    """The OpenAI form of a call, arguments as JSON text; without an id, which tokens do not carry."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}}


def _parse_span(text: str) -> Parsed:
    """Calls, or code, between python_start and python_end; calls behind it leave it as the text beside them."""
    inside, _, after = text.lstrip().removeprefix(_CODE_START).partition(_CODE_END)
    if after.strip():
        calls, reason = _attempt(after)
        return Parsed(calls, inside) if calls else Parsed((), text, reason or f"text behind {_CODE_END} is no call")
    calls, _ = _attempt(inside)
    return Parsed(calls or (ToolCall(CODE, {"code": inside}),), "")


def _attempt(text: str) -> tuple[tuple[ToolCall, ...], str | None]:
    """Calls, and the reason why there are none if the text looks like some."""
    if len(text) > _MAX_CHARS:
        return (), f"{len(text):,} characters are more than the {_MAX_CHARS:,} in which calls are looked for"
    try:
        return _read(text.strip()), None
    except (RecursionError, MemoryError):  # what the readers of JSON and Python raise on deep nesting
        return (), "nested too deeply for a call"
    except (ValueError, SyntaxError) as error:
        return (), f"looks like a call, but {error}"


def _read(text: str) -> tuple[ToolCall, ...]:
    if text.startswith("<function="):
        return _read_tags(text)
    if text.startswith("{"):
        return _read_json(text)
    if text.startswith("["):
        try:
            return _read_json(text)
        except json.JSONDecodeError:
            return pythonic.read(text)
    if _BUILT_IN.match(text):
        return tuple(ToolCall(call.name.removesuffix(".call"), call.arguments) for call in pythonic.read(f"[{text}]"))
    return ()


def _read_tags(text: str) -> tuple[ToolCall, ...]:
    calls, position = [], 0
    while position < len(text):
        opening = _TAG.match(text, position)
        if not opening:
            raise ValueError(f"<function=name> is wanted at character {position}")
        arguments, position = _DECODER.raw_decode(text, opening.end())
        closing = _CLOSING.match(text, position)
        if not closing:
            raise ValueError(f"</function> is wanted at character {position}")
        calls.append(_from_object({"name": opening[1], "parameters": arguments}))
        position = closing.end()
    return tuple(calls)


def _read_json(text: str) -> tuple[ToolCall, ...]:
    values, position = [], 0
    while position < len(text):
        value, position = _DECODER.raw_decode(text, position)
        values += value if isinstance(value, list) else [value]
        position = _BETWEEN.match(text, position).end()
    if not any(isinstance(value, dict) and {"name", "function"} & value.keys() for value in values):
        return ()
    return tuple(_from_object(value) for value in values)


def _from_object(value: Any) -> ToolCall:
    if not isinstance(value, Mapping) or value.get("type", "function") != "function":
        raise ValueError(f'a call is an object of type "function", not {str(value)[:60]!r}')
    inner = value.get("function", value)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"a call needs a name, a text; it has {str(name)[:60]!r}")
    arguments = inner.get("parameters", inner.get("arguments"))
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(f'{name!r} needs an object of "arguments" or "parameters"; it has {str(arguments)[:60]!r}')
    return ToolCall(name, dict(arguments))


def _checked(call: ToolCall) -> str:
    """The arguments as JSON; also for the other styles, so that all of them carry the same values."""
    try:
        written = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
        if isinstance(call.arguments, dict) and json.loads(written) == call.arguments:
            return written
        reason = "they change when written as JSON"
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(
        f"the arguments of {call.name!r} are not a JSON object ({reason}); "
        "use dict, list, str, int, float, bool and None, with texts as keys"
    )


def _render_json(calls, written: list[str]) -> str:
    """One object behind the other, as the published formats have it."""
    return "".join(
        f'{{"type": "function", "name": {json.dumps(call.name, ensure_ascii=False)}, "parameters": {arguments}}}'
        for call, arguments in zip(calls, written, strict=True)
    )


def _render_tags(calls, written: list[str]) -> str:
    for call in calls:
        if not _TAG.fullmatch(f"<function={call.name}>"):
            raise ValueError(f"{call.name!r} cannot stand in <function=...>: it has space, < or >; use style='json'")
    return "".join(
        f"<function={call.name}>{arguments}</function>" for call, arguments in zip(calls, written, strict=True)
    )


def _refuse(reason: str) -> Any:
    raise ValueError(reason)


_STYLES: dict[str, Callable[..., str]] = {
    "json": _render_json,
    "pythonic": lambda calls, written: pythonic.write(calls),
    "function": _render_tags,
}
