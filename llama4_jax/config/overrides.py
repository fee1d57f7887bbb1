"""Change a frozen configuration by dotted names, and write it to and read it from plain dicts.

`apply(config, ["text.num_layers=8"])` is what `--set text.num_layers=8` does in every experiment.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def apply(config: Config, assignments: Iterable[str]) -> Config:
    """Returns `config` with each `a.b=value` applied in order, and validated once all are.

    Raises ValueError for an unknown field (with the nearest known name) or a value of the wrong type.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"override {assignment!r} has no '='; write it as a.b=value")
        _assign(type(config), values, path.strip().split("."), text.strip(), path.strip())
    return from_dict(type(config), values)


def to_dict(config) -> dict[str, Any]:
    """Nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`; unknown keys raise with the nearest known name."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        _check_field(cls, name, name)
        nested = next((t for t in _members(hints[name]) if dataclasses.is_dataclass(t)), None)
        if nested is not None and value is not None:
            value = from_dict(nested, value)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def _assign(cls, values: dict[str, Any], names: list[str], text: str, path: str) -> None:
    """Sets the field that `names` leads to within `values`, the dict of a `cls`."""
    name, *rest = names
    _check_field(cls, name, path)
    members = _members(typing.get_type_hints(cls)[name])
    group = next((member for member in members if dataclasses.is_dataclass(member)), None)
    if rest:
        if group is None or values[name] is None:
            raise ValueError(f"{path}: {name} is {values[name]!r}, which has no field {rest[0]!r}")
        _assign(group, values[name], rest, text, path)
    elif group is not None and text != "None":
        fields = ", ".join(field.name for field in dataclasses.fields(group))
        raise ValueError(f"{path} is a group; set one of its fields ({fields}) or None")
    else:
        values[name] = _parse(text, members, path)


def _check_field(cls, name: str, path: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
        raise ValueError(f"{path}: {cls.__name__} has no field {name!r}; {hint}")


def _members(hint) -> tuple:
    """The alternatives of a type annotation: (int,) for int, (int, NoneType) for int | None."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _parse(text: str, members: tuple, path: str):
    for member in members:
        if member is type(None) and text == "None":
            return None
        if member is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if member is str:
            return text
        if member in (int, float):
            try:
                return member(text.replace("_", ""))
            except ValueError:
                continue
        if typing.get_origin(member) is tuple:
            item = typing.get_args(member)[0]
            return tuple(_parse(part.strip(), (item,), path) for part in text.strip("()").split(",") if part.strip())
    wanted = " or ".join(getattr(member, "__name__", str(member)) for member in members)
    raise ValueError(f"{path}: wanted {wanted}, got {text!r}")
