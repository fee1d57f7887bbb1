"""Golden runs of a reference implementation: what went in, and what its every layer gave.

A golden folder holds config.json, golden.npz (inputs, hidden states, logits, a greedy continuation) and meta.json. Weights
are either in the folder (model.safetensors) or drawn again from meta.json, which keeps the repository small: each tensor
depends only on a seed, its name and its shape, by arithmetic that every machine does alike, and a checksum proves it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import zlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file


@dataclasses.dataclass(frozen=True)
class Golden:
    """name; the folder to load the checkpoint from; arrays by their names in golden.npz."""

    name: str
    checkpoint: pathlib.Path
    arrays: Mapping[str, np.ndarray]

    @property
    def images(self) -> np.ndarray | None:
        """Tiles [n h w c], or None for a text model; the file holds them [n c h w]."""
        pixels = self.arrays.get("pixel_values")
        return None if pixels is None else pixels.transpose(0, 2, 3, 1)


def load(folder: pathlib.Path, scratch: pathlib.Path) -> Golden:
    """The golden in `folder`; weights that are not there are drawn into `scratch`."""
    checkpoint = folder
    if not (folder / "model.safetensors").exists():
        checkpoint = scratch / folder.name
        meta = json.loads((folder / "meta.json").read_text())
        write_checkpoint(folder, checkpoint, draw_all(meta["shapes"], meta["seed"]), meta["sha256"])
    with np.load(folder / "golden.npz") as arrays:
        return Golden(folder.name, checkpoint, dict(arrays))


def write_checkpoint(
    folder: pathlib.Path, target: pathlib.Path, weights: Mapping[str, np.ndarray], sha256: str
) -> None:
    """Makes `target` a whole checkpoint: the configuration in `folder` with `weights`, whose checksum must agree."""
    if digest(weights) != sha256:
        raise ValueError(
            f"weights drawn for {folder} have checksum {digest(weights)}, wanted {sha256}: the way of drawing has "
            "changed; restore it or make the goldens again"
        )
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(folder / name, target / name)
    save_file(dict(weights), target / "model.safetensors", metadata={"format": "pt"})


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(f"{name}{weights[name].shape}".encode())
        total.update(np.ascontiguousarray(weights[name]).tobytes())
    return total.hexdigest()


def draw_all(shapes: Mapping[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    return {name: draw(name, tuple(shape), seed) for name, shape in shapes.items()}


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 weight of Hugging Face name `name`, at a scale at which every mistake shows in the logits.

    Norms scatter around 1, biases are not zero, routers decide clearly, attention is peaky.
    """
    unit = _unit(shape, (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**32)
    if "norm" in name and name.endswith(".weight"):
        value = 1 + 0.3 * unit
    elif name.endswith("bias"):
        value = 0.2 * unit
    elif "class_embedding" in name or "positional_embedding" in name:
        value = 0.5 * unit
    elif "embed_tokens" in name:
        value = unit
    else:
        gains = {"router": 4.0, ".q_proj": 2.0, ".k_proj": 2.0, "lm_head": 2.0}
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        value = unit * (gain / math.sqrt(shape[1]))  # inputs are axis 1 of [out in] and of [experts in out]
    return value.astype(np.float32)


def _unit(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Nearly normal numbers of deviation 1: sums of four uniform ones, which round alike on every machine.

    (A normal generator calls log and cos, whose last bit depends on the C library.)
    """
    uniform = np.random.RandomState(seed)
    parts = [uniform.random_sample(shape) for _ in range(4)]
    return (parts[0] + parts[1] + parts[2] + parts[3] - 2.0) * math.sqrt(3.0)
