"""A tiny checkpoint in Meta's released form, drawn by numpy alone from what `tests/goldens/hf_conversion.json` holds.

What Hugging Face's script makes of the same checkpoint is in that file too: see `tests/parity/make_hf_conversion.py`.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
from released_files import released

SHARDS = (1, 2, 8)  # the released models have 8
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def draw(shapes: Mapping[str, Sequence[int]], seed: int, dtype: str) -> dict[str, np.ndarray]:
    """Weights of Meta's modules: uniform in [-1, 1), each from the seed and its name, in which no two parts agree."""

    def weight(name: str, shape: Sequence[int]) -> np.ndarray:
        source = np.random.RandomState(seed + zlib.crc32(name.encode()) % 2**31)
        return (2 * source.random_sample(tuple(shape)) - 1).astype(np.float32).astype(DTYPES[dtype])

    return {name: weight(name, shape) for name, shape in shapes.items()}


def write(folder: pathlib.Path, golden: Mapping, dtype: str, shards: int, save: Callable, suffix: str) -> pathlib.Path:
    """Writes the checkpoint that `golden` describes to `folder`, in `shards` files; `save(tensors, path)` writes one."""
    folder.mkdir(parents=True)
    for name in ("params.json", "llama4_jax.json"):
        (folder / name).write_text(json.dumps(golden[name]))
    modules = draw(golden["shapes"], golden["seed"], dtype)
    for shard in range(shards):
        named = released(modules, shard, shards)
        save({key: np.ascontiguousarray(named[key]) for key in named}, folder / f"consolidated.{shard:02d}{suffix}")
    return folder


def fingerprint(tensor: np.ndarray) -> dict:
    """Shape and SHA-256 of the little-endian bytes, which say all of a tensor but its dtype."""
    return {"shape": list(tensor.shape), "sha256": hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()}
