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
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

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
INTEGERS = {"I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}  # of quantised weights
CODES = {dtype: code for code, dtype in (DTYPES | INTEGERS).items()}

Spec = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a tensor


class Reader:
    """The tensors of a folder's safetensors files: shapes and dtypes at once, values when asked for.

    Invariants: `shapes` and `dtypes` have the same keys; each key lives in exactly one file. Raises FileNotFoundError
    where files are missing, ValueError where index and files disagree or where a dtype is none of `dtypes`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        listing: Mapping[str, set[str] | None],
        dtypes: Mapping[str, np.dtype] = MappingProxyType(DTYPES),
    ):
        self._known = dtypes
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, tuple[pathlib.Path, int]] = {}
        for name, expected in listing.items():
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; the index of {folder} lists it. Download it again."
                )
            start, header = _read_header(folder / name)
            if expected is not None and header.keys() != expected:
                raise ValueError(
                    f"{folder / INDEX} and {name} disagree: only in the index {sorted(expected - header.keys())}, "
                    f"only in the file {sorted(header.keys() - expected)}. Download both again."
                )
            for key, entry in header.items():
                self._add(key, entry, start, folder / name)

    def _add(self, key: str, entry: Mapping[str, Any], start: int, path: pathlib.Path) -> None:
        if entry["dtype"] not in self._known:
            raise NotImplementedError(
                f"{path.name}: {key} has dtype {entry['dtype']}; this reads {', '.join(self._known)}. "
                "Dequantise the checkpoint to bfloat16 first."
            )
        self.shapes[key] = tuple(entry["shape"])
        self.dtypes[key] = self._known[entry["dtype"]]
        self._places[key] = path, start + entry["data_offsets"][0]

    def read(self, key: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of its first axis, in the dtype in which it is stored.

        Read and not mapped: pages of a mapped file count as the process's own memory.
        """
        path, begin = self._places[key]
        return read_rows(path, begin, self.shapes[key], self.dtypes[key], rows)


def read_rows(path: pathlib.Path, begin: int, shape: tuple[int, ...], dtype: np.dtype, rows: slice) -> np.ndarray:
    """Some rows of the tensor that lies in `path` from byte `begin`."""
    if not shape:
        return np.fromfile(path, np.uint8, dtype.itemsize, offset=begin).view(dtype).reshape(shape)
    start, stop, _ = rows.indices(shape[0])
    width = math.prod(shape[1:]) * dtype.itemsize
    flat = np.fromfile(path, np.uint8, (stop - start) * width, offset=begin + start * width)
    return flat.view(dtype).reshape(stop - start, *shape[1:])


def _read_header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file start, and what its header says of each tensor."""
    with safe_open(path, framework="numpy"):  # the library checks that header and file agree
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def open_folder(folder: pathlib.Path) -> contextlib.AbstractContextManager[Reader]:
    """A `Reader` of `folder`, of integers too."""
    return contextlib.nullcontext(Reader(folder, _listing(folder), DTYPES | INTEGERS))


def open_file(path: pathlib.Path) -> contextlib.AbstractContextManager[Reader]:
    """A `Reader` of one safetensors file."""
    return contextlib.nullcontext(Reader(path.parent, {path.name: None}))


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
    files = plan_folder(specs, max_shard_bytes)
    for name, keys in files.items():
        write_file(folder / name, {key: specs[key] for key in keys}, produce)
    write_index(folder, specs, files)


def plan_folder(specs: Mapping[str, Spec], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors in it."""
    shards = _shards({key: spec_bytes(spec) for key, spec in specs.items()}, max_shard_bytes)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": keys for i, keys in enumerate(shards)}


def write_index(folder: pathlib.Path, specs: Mapping[str, Spec], files: Mapping[str, Sequence[str]]) -> None:
    """Writes which of `files` has which tensor; a single file needs no index."""
    if len(files) > 1:
        weight_map = {key: name for name, keys in files.items() for key in keys}
        index = {"metadata": {"total_size": sum(map(spec_bytes, specs.values()))}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(path: pathlib.Path, specs: Mapping[str, Spec], produce: Callable[[str], np.ndarray]) -> None:
    """Writes one safetensors file, a tensor at a time: the peak is the largest tensor.

    Raises ValueError where `produce(name)` is not what `specs` promises, after part of the file is written.
    """
    head, places = header(specs)
    with open(path, "wb") as file:
        file.write(head)
        for key in places:
            tensor = np.ascontiguousarray(produce(key))
            if (tensor.shape, tensor.dtype) != specs[key]:
                raise ValueError(f"{key}: wanted {specs[key]}, got {(tensor.shape, tensor.dtype)}")
            file.write(tensor.reshape(-1).view(np.uint8).data)


def header(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file of these tensors begins, and at which byte of it each tensor does, in that order.

    Raises NotImplementedError for a dtype that is not written.
    """
    # Wide numbers first, so that every tensor starts at a multiple of its item size.
    order = sorted(specs, key=lambda key: -specs[key][1].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for key in order:
        shape, dtype = specs[key]
        if dtype not in CODES:
            raise NotImplementedError(
                f"{key} is {dtype}; wanted {', '.join(map(str, CODES))}. Dequantise the model first."
            )
        begins[key], position = position, position + spec_bytes(specs[key])
        entries[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begins[key], position]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + begin for key, begin in begins.items()}


def spec_bytes(spec: Spec) -> int:
    """The size of a tensor."""
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
