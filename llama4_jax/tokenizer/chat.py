r"""Dialogues in the OpenAI form to the ids that a Llama 4 model reads, and back.

A dialogue is `<|begin_of_text|>` and its messages, each `<|header_start|>role<|header_end|>\n\n`, the content, and
`<|eom|>` behind tool calls and tool results (the turn goes on), `<|eot|>` behind the rest. Content is neither trimmed
nor searched for special tokens: a written `<|eot|>` stays text.

Source: the Llama 4 prompt format and Meta's `ChatFormat`, which this equals token for token. The thinking span in front
of an assistant's content is our use of the published tokens for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llama4_jax.tokenizer import bpe, image_spans, tool_calls
from llama4_jax.tokenizer import message_fields as fields

Tile = Callable[[Any], tuple[Any, tuple[int, int]]]  # a picture -> its tiles, and how many (rows, columns) they make
_THINKING = ("reasoning_thinking_start", "reasoning_thinking_end")


@dataclasses.dataclass(frozen=True)
class Dialog:
    """A dialogue as a model reads it.

    tokens: ids. loss_mask: for each of them, whether the assistant says it (its thoughts, content, calls and the token
    that ends its message; not its header). images: for each picture in order of appearance, what `tile` made of it, or
    the picture as given where its part has a "grid".
    """

    tokens: list[int]
    loss_mask: list[bool]
    images: list


def encode_dialog(
    tok: bpe.Tokenizer,
    messages: Iterable[Mapping[str, Any]],
    *,
    add_generation_prompt: bool | None = None,
    tile: Tile | None = None,
    tokens_per_tile: int = 144,
    tool_style: str = "json",
) -> Dialog:
    """The dialogue of OpenAI-form `messages`.

    A message has a "role" (system, user, assistant, tool) and "content": text or a list of parts
    {"type": "text", "text": ...}, {"type": "image", "image": anything that `tile` takes},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}} (`tile` gets its bytes). An image part may
    have a "grid", its (rows, columns) of tiles, and then needs no `tile`. An assistant's message may have
    "reasoning_content", said before the content, and "tool_calls", said after it.

    add_generation_prompt: whether to end with the header of an assistant's message; by default, unless the last message
    is one. tokens_per_tile: placeholders a tile, 144 for tiles of 336 pixels. tool_style: how calls are written, see
    `tool_calls.render`.

    Raises ValueError, naming the message by its place, for one that is malformed, for a picture without "grid" or
    `tile`, and for thoughts when the tokenizer has no tokens for them.
    """
    messages = list(messages)
    if not messages:
        raise ValueError("a dialogue of no messages; give at least one")
    writer = _Writer(tok, tile, tokens_per_tile, tool_style)
    writer.special("begin_of_text")
    for place, message in enumerate(messages):
        try:
            writer.message(message)
        except ValueError as error:
            raise ValueError(f"message {place}: {error}") from error
    if add_generation_prompt is None:
        add_generation_prompt = messages[-1]["role"] != "assistant"
    if add_generation_prompt:
        writer.header("assistant")
    return Dialog(writer.tokens, writer.loss_mask, writer.images)


def decode_dialog(tok: bpe.Tokenizer, tokens: Iterable[int]) -> list[dict[str, Any]]:
    """The messages in `tokens`; `encode_dialog` makes the same tokens of them.

    Content is a text, or a list of parts where there are pictures: {"type": "image", "grid": (rows, columns)}. Texts
    that were given in several parts come back as one. Calls are read where an assistant's message ends in `<|eom|>`, as
    they are written here; for an answer that ends otherwise, `tool_calls.parse` its content. A last message may lack
    its end; a generation prompt is no message, and what follows `<|end_of_text|>` or padding is left out.

    Raises ValueError, saying what stands where, for anything but a dialogue.
    """
    tokens = [int(token) for token in tokens]
    messages = []
    place = 1 if tokens[:1] == [tok.bos] else 0
    while place < len(tokens) and tokens[place] not in (tok.eos, tok.pad):
        role, start = _read_header(tok, tokens, place)
        end = next((at for at in range(start, len(tokens)) if tokens[at] in tok.stop), len(tokens))
        if start < len(tokens):
            messages.append(_read_message(tok, role, tokens[start:end], tokens[end : end + 1]))
        place = end + 1
    return messages


class _Writer:
    """Collects tokens, their loss mask and the pictures, message by message."""

    def __init__(self, tok: bpe.Tokenizer, tile: Tile | None, tokens_per_tile: int, tool_style: str):
        self.tokens: list[int] = []
        self.loss_mask: list[bool] = []
        self.images: list = []
        self._tok, self._tile, self._tokens_per_tile, self._tool_style = tok, tile, tokens_per_tile, tool_style

    def add(self, tokens: Sequence[int], said: bool = False) -> None:
        self.tokens += tokens
        self.loss_mask += [said] * len(tokens)

    def special(self, name: str, said: bool = False) -> None:
        if name not in self._tok.special:
            raise ValueError(f"this tokenizer has no <|{name}|>; leave out what needs it, or load one that has it")
        self.add([self._tok.special[name]], said)

    def text(self, text: str, said: bool = False) -> None:
        self.add(self._tok.encode(text), said)

    def header(self, role: str) -> None:
        self.special("header_start")
        self.text(fields.ROLES[role])
        self.special("header_end")
        self.text("\n\n")

    def message(self, message: Mapping[str, Any]) -> None:
        role = fields.role(message)
        said = role == "assistant"
        thoughts, calls = fields.thoughts(message), fields.calls(message)
        self.header(role)
        if thoughts:
            self.special(_THINKING[0], said)
            self.text(thoughts, said)
            self.special(_THINKING[1], said)
        for part in fields.parts(message, optional=bool(calls or thoughts)):
            if part["type"] == "text":
                self.text(part["text"], said)
            else:
                self.picture(part)
        # JSON calls one by one, as the published format encodes them; the other styles join them.
        for together in [[call] for call in calls] if self._tool_style == "json" else [calls] * bool(calls):
            self.text(tool_calls.render(together, self._tool_style), said)
        self.special("eom" if calls or role == "tool" else "eot", said)

    def picture(self, part: Mapping[str, Any]) -> None:
        picture, grid = fields.picture(part), fields.grid(part)
        if grid is None:
            if self._tile is None:
                raise ValueError(
                    'a picture without "grid", its (rows, columns) of tiles; give it, or pass tile=... that cuts '
                    "pictures, as llama4_jax.data.images.tile does"
                )
            picture, grid = self._tile(picture)
        self.add(image_spans.write(self._tok, *grid, self._tokens_per_tile))
        self.images.append(picture)


def _read_header(tok: bpe.Tokenizer, tokens: list[int], place: int) -> tuple[str, int]:
    """The role in the header at `place`, and where the content starts."""
    close, newlines = tok.special["header_end"], tok.encode("\n\n")
    end = tokens.index(close, place) if close in tokens[place:] else place
    start = end + 1 + len(newlines)
    if tokens[place] != tok.special["header_start"] or tokens[end + 1 : start] != newlines:
        raise ValueError(f"token {place}: wanted a message's header, got {tok.decode(tokens[place : place + 8])!r}")
    spelled = tok.decode(tokens[place + 1 : end])
    roles = [role for role, written in fields.ROLES.items() if written == spelled]
    if not roles:
        raise ValueError(f"token {place}: the header names {spelled[:60]!r}; wanted {', '.join(fields.ROLES.values())}")
    return roles[0], start


def _read_message(tok: bpe.Tokenizer, role: str, body: list[int], end: list[int]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role}
    if body[:1] == [tok.special.get(_THINKING[0])]:
        close = tok.special[_THINKING[1]]
        stop = body.index(close) if close in body else len(body)
        message["reasoning_content"] = tok.decode(body[1:stop])
        body = body[stop + 1 :]
    parts = _read_parts(tok, body)
    if any(part["type"] == "image" for part in parts):
        return message | {"content": parts}
    message["content"] = "".join(part["text"] for part in parts)
    if role == "assistant" and end == [tok.special["eom"]]:
        found = tool_calls.split(message["content"])
        if found.calls:
            message["content"] = found.text
            message["tool_calls"] = [tool_calls.to_openai(call) for call in found.calls]
    return message


def _read_parts(tok: bpe.Tokenizer, body: list[int]) -> list[dict[str, Any]]:
    first, last = tok.special["image_start"], tok.special["image_end"]
    parts: list[dict[str, Any]] = []
    while body:
        start = body.index(first) if first in body else len(body)
        if start:
            parts.append({"type": "text", "text": tok.decode(body[:start])})
        body = body[start:]
        if body:
            stop = body.index(last) + 1 if last in body else len(body)
            parts.append({"type": "image", "grid": image_spans.read(tok, body[:stop])})
            body = body[stop:]
    return parts
