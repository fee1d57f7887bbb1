"""Named tensors in safetensors files, one file or shards with an index; read and written a tensor or a shard at a time.

Source: the safetensors format and Hugging Face's `model.safetensors.index.json` (`weight_map`: tensor -> file).
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Reader:
    """The tensors of a folder: shapes and dtypes at once, values when asked for.

    Invariants: `shapes` and `dtypes` have the same keys; each key lives in exactly one file. Raises FileNotFoundError
    where files are missing, ValueError where index and files disagree or where a dtype is not a float this reads.
    """

    def __init__(self, folder: pathlib.Path, files: contextlib.ExitStack):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._files = {}
        for name, expected in _listing(folder).items():
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; the index of {folder} lists it. Download it again."
                )
            file = files.enter_context(safe_open(folder / name, framework="numpy"))
            keys = set(file.keys())
            if expected is not None and keys != expected:
                raise ValueError(
                    f"{folder / INDEX} and {name} disagree: only in the index {sorted(expected - keys)}, "
                    f"only in the file {sorted(keys - expected)}. Download both again."
                )
            for key in keys:
                self._add(key, file, name)

    def _add(self, key: str, file, name: str) -> None:
        view = file.get_slice(key)
        if view.get_dtype() not in DTYPES:
            raise NotImplementedError(
                f"{name}: {key} has dtype {view.get_dtype()}; this reads {', '.join(DTYPES)}. "
                "Dequantise the checkpoint to bfloat16 first."
            )
        self.shapes[key] = tuple(view.get_shape())
        self.dtypes[key] = DTYPES[view.get_dtype()]
        self._files[key] = file

    def read(self, key: str) -> np.ndarray:
        """One tensor, in the dtype in which it is stored."""
        return self._files[key].get_tensor(key)


@contextlib.contextmanager
def open_folder(folder: pathlib.Path) -> Iterator[Reader]:
    """A `Reader` of `folder` whose files are closed at the end."""
    with contextlib.ExitStack() as files:
        yield Reader(folder, files)


def _listing(folder: pathlib.Path) -> dict[str, set[str] | None]:
    """File name -> the tensors that the index promises in it (None without an index)."""
    if (folder / INDEX).is_file():
        listing: dict[str, set[str] | None] = {}
        for key, name in json.loads((folder / INDEX).read_text())["weight_map"].items():
            listing.setdefault(name, set()).add(key)
        return listing
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; found {present}")


def write_folder(
    folder: pathlib.Path,
    sizes: Mapping[str, int],
    produce: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes the tensors named in `sizes` (name -> bytes), made one shard at a time by `produce(name)`.

    One file where all fit in `max_shard_bytes`, else shards with an index; a tensor above the limit gets its own shard.
    """
    shards = _shards(sizes, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, keys in zip(names, shards):
        save_file({key: produce(key) for key in keys}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -math.inf
    for key, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    return shards
