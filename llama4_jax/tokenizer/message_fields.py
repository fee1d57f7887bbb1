"""Reads the fields of OpenAI-form messages, and says what is wrong with them.

Nothing here fetches a URL or opens a file: messages may come from anyone.

Source: the message format of OpenAI's chat completions; "reasoning_content" as servers of open models name it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from llama4_jax.tokenizer import tool_calls

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}  # as headers spell them


def role(message: Any) -> str:
    """The role of a message, one of ROLES; raises ValueError for another, and for what is no message."""
    found = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(found, str) or found not in ROLES:
        raise ValueError(f'it has role={found!r}; wanted a dict with a "role" of {", ".join(ROLES)}')
    return found


def thoughts(message: Mapping[str, Any]) -> str:
    """The "reasoning_content" of a message, empty without any; raises ValueError unless the assistant says it."""
    found = message.get("reasoning_content") or ""
    if not isinstance(found, str):
        raise ValueError(f'"reasoning_content" is {type(found).__name__}; wanted a text')
    if found and message["role"] != "assistant":
        raise ValueError(f"only the assistant has reasoning_content, not role={message['role']!r}")
    return found


def calls(message: Mapping[str, Any]) -> list[tool_calls.ToolCall]:
    """The "tool_calls" of a message; raises ValueError for damaged ones, and unless the assistant makes them."""
    found = message.get("tool_calls") or []
    if not isinstance(found, (list, tuple)):
        raise ValueError(f'"tool_calls" is {type(found).__name__}; wanted a list')
    if found and message["role"] != "assistant":
        raise ValueError(f"only the assistant has tool_calls, not role={message['role']!r}")
    return [tool_calls.from_openai(call) for call in found]


def parts(message: Mapping[str, Any], optional: bool) -> list[Mapping[str, Any]]:
    """The content of a message as parts of type "text", "image" or "image_url"; none if it is absent and `optional`.

    Raises ValueError for other content and other types.
    """
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None and optional:
        return []
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f'"content" is {"missing" if content is None else type(content).__name__}; '
            "wanted a text or a list of parts (write other values as JSON text)"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f'a part has type {kind!r}; wanted "text", "image" or "image_url"')
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f'a part of type "text" needs a "text", got {type(part.get("text")).__name__}')
        if kind != "text" and message["role"] == "assistant":
            raise ValueError("an assistant says no pictures; move the picture to a message of the user or a tool")
    return list(content)


def grid(part: Mapping[str, Any]) -> tuple[int, int] | None:
    """The "grid" of an image part, (rows, columns); None without one. Raises ValueError for other than two integers."""
    found = part.get("grid")
    if found is None:
        return None
    if not isinstance(found, (list, tuple)) or [type(number) for number in found] != [int, int]:
        raise ValueError(f'a picture\'s "grid" is {found!r}; wanted its (rows, columns) of tiles')
    return found[0], found[1]


def picture(part: Mapping[str, Any]) -> Any:
    """The picture in an image part: as it is, or the bytes of a data URL. With a "grid", it may be absent or elsewhere.

    Raises ValueError when there is none, for a URL that would have to be fetched, and for a damaged data URL.
    """
    if part["type"] == "image":
        if part.get("image") is None and part.get("grid") is None:
            raise ValueError('a part of type "image" needs an "image" or a "grid"')
        return part.get("image")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if not isinstance(url, str):
        raise ValueError('a part of type "image_url" needs {"image_url": {"url": ...}}')
    if url.startswith("data:"):
        return _decoded(url)
    if part.get("grid") is None:
        raise ValueError(
            f"{url[:60]!r} is not fetched from here; read it, and give its bytes as a data: URL or an image"
        )
    return url


def _decoded(url: str) -> bytes:
    kind, _, encoded = url.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError(f"{kind[:60]!r} is not in base64")
        return base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"a data: URL that cannot be read ({error}); wanted data:image/png;base64,...") from error
