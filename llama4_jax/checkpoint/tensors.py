"""Named tensors in safetensors files, one file or shards with an index; read and written a tensor at a time.

Source: the safetensors format and Hugging Face's `model.safetensors.index.json` (`weight_map`: tensor -> file).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

Spec = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a tensor


class Reader:
    """The tensors of a folder's safetensors files: shapes and dtypes at once, values when asked for.

    Invariants: `shapes` and `dtypes` have the same keys; each key lives in exactly one file. Raises FileNotFoundError
    where files are missing, ValueError where index and files disagree or where a dtype is not a float this reads.
    """

    def __init__(self, folder: pathlib.Path, listing: Mapping[str, set[str] | None], files: contextlib.ExitStack):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._files = {}
        for name, expected in listing.items():
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
                self._add(key, file, folder / name)

    def _add(self, key: str, file, path: pathlib.Path) -> None:
        view = file.get_slice(key)
        if view.get_dtype() not in DTYPES:
            raise NotImplementedError(
                f"{path.name}: {key} has dtype {view.get_dtype()}; this reads {', '.join(DTYPES)}. "
                "Dequantise the checkpoint to bfloat16 first."
            )
        self.shapes[key] = tuple(view.get_shape())
        self.dtypes[key] = DTYPES[view.get_dtype()]
        self._files[key] = file, path

    def read(self, key: str) -> np.ndarray:
        """One tensor, in the dtype in which it is stored."""
        file, path = self._files[key]
        if self.dtypes[key] != DTYPES["F8_E4M3"]:
            return file.get_tensor(key)
        # The library looks FP8 up in numpy, which has no such type.
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            begin, end = json.loads(raw.read(length))[key]["data_offsets"]
            raw.seek(8 + length + begin)
            return np.frombuffer(raw.read(end - begin), self.dtypes[key]).reshape(self.shapes[key])


@contextlib.contextmanager
def open_folder(folder: pathlib.Path) -> Iterator[Reader]:
    """A `Reader` of `folder` whose files are closed at the end."""
    with contextlib.ExitStack() as files:
        yield Reader(folder, _listing(folder), files)


@contextlib.contextmanager
def open_file(path: pathlib.Path) -> Iterator[Reader]:
    """A `Reader` of one safetensors file, which is closed at the end."""
    with contextlib.ExitStack() as files:
        yield Reader(path.parent, {path.name: None}, files)


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
    specs: Mapping[str, Spec],
    produce: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes the tensors named in `specs`, made one at a time by `produce(name)`.

    One file where all fit in `max_shard_bytes`, else shards with an index; a tensor above the limit gets its own shard.
    """
    sizes = {key: _bytes(spec) for key, spec in specs.items()}
    shards = _shards(sizes, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, keys in zip(names, shards):
        write_file(folder / name, {key: specs[key] for key in keys}, produce)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(path: pathlib.Path, specs: Mapping[str, Spec], produce: Callable[[str], np.ndarray]) -> None:
    """Writes one safetensors file, a tensor at a time: the peak is the largest tensor.

    Raises ValueError where `produce(name)` is not what `specs` promises, after part of the file is written.
    """
    # Wide numbers first, so that every tensor starts at a multiple of its item size.
    order = sorted(specs, key=lambda key: -specs[key][1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key in order:
        shape, dtype = specs[key]
        if dtype not in CODES:
            raise NotImplementedError(
                f"{key} is {dtype}; wanted {', '.join(map(str, CODES))}. Dequantise the model first."
            )
        end = position + _bytes(specs[key])
        header[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = np.ascontiguousarray(produce(key))
            if (tensor.shape, tensor.dtype) != specs[key]:
                raise ValueError(f"{key}: wanted {specs[key]}, got {(tensor.shape, tensor.dtype)}")
            file.write(tensor.reshape(-1).view(np.uint8).data)


def _bytes(spec: Spec) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


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


@contextlib.contextmanager
def replaced_folder(folder, is_ours: Callable[[pathlib.Path], bool]) -> Iterator[pathlib.Path]:
    """An empty folder to write to, which takes the place of `folder` at the end; after an exception nothing changes.

    Files already in `folder` move along, except those for which `is_ours` tells that they are of the old checkpoint.
    """
    folder = pathlib.Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        staged = pathlib.Path(scratch) / "new"
        staged.mkdir()
        yield staged
        for path in folder.iterdir() if folder.is_dir() else ():
            if not is_ours(path):
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, staged / path.name)
        if folder.exists():
            os.rename(folder, pathlib.Path(scratch) / "old")
        os.rename(staged, folder)
