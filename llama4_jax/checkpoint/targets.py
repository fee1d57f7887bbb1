"""What a conversion writes: a folder that comes about unit by unit, a tensor or a parameter at a time.

The order of calls is `prepare`, then `write` for each unit, in one process or several one after another, then `finish`.
A record (JSON) tells what a unit's bits are; `stored` makes it anew from what lies on disk.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from llama4_jax.checkpoint import assembly, hf, items, layouts, mapping, meta, native, tensors
from llama4_jax.checkpoint.items import Record
from llama4_jax.checkpoint.leaves import Leaves, whole

READ_BYTES = 1 << 24

Transform = Callable[[str, np.ndarray], np.ndarray]  # path, parameter -> the same shape in the dtype to be stored


class Target(Protocol):
    """A checkpoint to be. `units` are all that has to be written, with their sizes in bytes."""

    units: Mapping[str, int]

    def prepare(self, folder: pathlib.Path) -> None: ...  # may be called again after an interruption

    def write(self, folder: pathlib.Path, unit: str) -> Record: ...

    def stored(self, folder: pathlib.Path, unit: str) -> Record: ...

    def finish(self, folder: pathlib.Path, records: Mapping[str, Record]) -> None: ...


class Named(Protocol):
    """Tensors that are made in pieces when asked for."""

    specs: Mapping[str, tensors.Spec]

    def pieces(self, key: str) -> Iterator[np.ndarray]: ...


class Safetensors:
    """Tensors of `named` in `files` (file name -> keys), beside JSON `documents` (file name -> content).

    Files have their full size from the start, so that a full disk shows at once, and each tensor goes to its place in
    pieces. Raises NotImplementedError for a dtype that is not written.
    """

    def __init__(self, named: Named, files: Mapping[str, list[str]], documents: Mapping[str, dict]):
        self._named, self._files, self._documents = named, files, documents
        self._specs = named.specs
        self.units = {key: tensors.spec_bytes(spec) for key, spec in self._specs.items()}
        self._heads: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for name, keys in files.items():
            self._heads[name], begins = tensors.header({key: self._specs[key] for key in keys})
            self._places |= {key: (name, begin) for key, begin in begins.items()}

    def prepare(self, folder: pathlib.Path) -> None:
        for name, keys in self._files.items():
            size = len(self._heads[name]) + sum(self.units[key] for key in keys)
            with open(folder / name, "r+b" if (folder / name).exists() else "w+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                file.write(self._heads[name])

    def write(self, folder: pathlib.Path, unit: str) -> Record:
        name, begin = self._places[unit]
        written = crc32 = 0
        with open(folder / name, "r+b", buffering=0) as file:
            file.seek(begin)
            for piece in self._named.pieces(unit):
                content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                crc32 = zlib.crc32(content, crc32)
                written += _write_all(file, content)
        if written != self.units[unit]:
            raise ValueError(f"{unit}: wanted {self.units[unit]} bytes, made {written}")
        return {"crc32": crc32}

    def stored(self, folder: pathlib.Path, unit: str) -> Record:
        name, begin = self._places[unit]
        left, crc32 = self.units[unit], 0
        with open(folder / name, "rb") as file:
            file.seek(begin)
            while left and (content := file.read(min(left, READ_BYTES))):
                left, crc32 = left - len(content), zlib.crc32(content, crc32)
        return {"crc32": crc32}

    def finish(self, folder: pathlib.Path, records: Mapping[str, Record]) -> None:
        tensors.write_index(folder, self._specs, self._files)
        for name, content in self._documents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


class Native:
    """Our own checkpoint of `source`; `transform`, if given, is applied to each whole parameter before it is written."""

    def __init__(self, source: Leaves, transform: Transform | None):
        self._source, self._transform = source, transform
        self.units = {path: tensors.spec_bytes(spec) for path, spec in source.specs.items()}

    def prepare(self, folder: pathlib.Path) -> None:
        (folder / native.PARAMETERS).mkdir(exist_ok=True)

    def write(self, folder: pathlib.Path, unit: str) -> Record:
        spec, window = self._source.specs[unit], functools.partial(self._source.window, unit)
        if self._transform is not None:
            leaf = self._transform(unit, window(whole(spec[0])))
            if leaf.shape != spec[0]:
                raise ValueError(f"{unit}: the transform must keep the shape {spec[0]}, got {leaf.shape}")
            spec, window = (leaf.shape, leaf.dtype), leaf.__getitem__
        with items.Writer() as writer:
            return writer.write(native.item(folder, unit), spec, self._source.axis(unit), window)

    def stored(self, folder: pathlib.Path, unit: str) -> Record:
        return items.stored_record(native.item(folder, unit))

    def finish(self, folder: pathlib.Path, records: Mapping[str, Record]) -> None:
        native.write_manifest(folder, self._source, {path: records[path] for path in self.units})


def make(kind: str, source: Leaves, max_shard_bytes: int, transform: Transform | None) -> Target:
    """The checkpoint of `kind` (`convert.WRITTEN`) that holds `source`; nothing is written yet.

    Raises NotImplementedError for what the format cannot express, ValueError where its table does not cover the model.
    """
    if kind == "orbax":
        return Native(source, transform)
    if transform is not None:
        raise NotImplementedError(f"a transform on the way to {kind!r}; only 'orbax' stores what a transform makes")
    if kind == "meta":
        contents, named = meta.documents(source), assembly.Tensors(source, layouts.META_MODULES)
        return Safetensors(named, {meta.WRITTEN: list(named.specs)}, contents)
    contents, named = hf.documents(source), hf.named_tensors(source, _HF[kind])
    return Safetensors(named, tensors.plan_folder(named.specs, max_shard_bytes), contents)


_HF: dict[str, mapping.Layout] = {"hf": layouts.HF_FUSED, "hf_unfused": layouts.HF_UNFUSED}


def _write_all(file, content: np.ndarray) -> int:
    """Writes all of `content`: the kernel takes at most 2 GB at a time."""
    written = 0
    while written < content.size:
        written += file.write(content[written:].data)
    return written
