"""A folder of prepared text made in a moment: what `experiments.prepare_text` leaves, without its cleaning and TensorFlow."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from llama4_jax.data.preparation import ledger, read, shards


def prepare(folder: pathlib.Path, texts: Sequence[str], documents: int) -> None:
    """Writes `texts` to shards of so many `documents`, in order, and the manifest."""
    folder.mkdir(parents=True)
    parts = [texts[start : start + documents] for start in range(0, len(texts), documents)]
    described = []
    for number, part in enumerate(parts):
        name = f"text-{number:05d}-of-{len(parts):05d}.arrayrecord"
        shards.write(folder / name, [json.dumps({"text": text}).encode() for text in part])
        described.append(ledger.describe(folder / name, name) | {"documents": len(part)})
    ledger.write(folder / read.MANIFEST, json.dumps({"shards": described}).encode())
