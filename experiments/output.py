"""How every experiment ends: its final numbers as lines that line up, and as one JSON object where --json says."""

from __future__ import annotations

import json
import logging as standard_logging
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

JSON = flags.DEFINE_string("json", None, "write the final numbers to this file as one JSON object")


def quiet_libraries() -> None:
    """Keeps Orbax, which reports each file through absl, from drowning the progress bar; our own lines stay."""
    logging.set_verbosity(logging.WARNING)
    standard_logging.getLogger("llama4_jax").setLevel(standard_logging.INFO)


def finish(results: Mapping[str, Any], *more: pathlib.Path, unprinted: Mapping[str, Any] | None = None) -> None:
    """Prints `results`, and writes them to --json if given and to the files in `more`; `unprinted` is written alone."""
    flat = dict(_flatten(results))
    width = max(map(len, flat))
    for name, value in flat.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    for path in [*more, *([pathlib.Path(JSON.value)] if JSON.value else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        written = {**results, **(unprinted or {})}
        temporary.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)


def _flatten(values: Mapping[str, Any], prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
