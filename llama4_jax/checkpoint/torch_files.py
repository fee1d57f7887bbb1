"""Tensors in files of `torch.save`, read without torch.

Such a file is a zip archive: `data.pkl`, a pickle that names storages instead of holding them, and one raw member a
storage (`data/0`, ...). Unpickling can run any code, so nothing here is ever looked up by name: the few functions that
rebuild tensors are replaced by ours, and everything else becomes an `Opaque` that does nothing.

Source: the format of `torch.serialization` since torch 1.6 (`_rebuild_tensor_v2` and typed storages).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from llama4_jax.checkpoint import tensors

logger = logging.getLogger(__name__)
STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}


class Opaque:
    """An object of a class that this reader does not know: it can be made and filled, and does nothing."""

    def __init__(self, *_, **__): ...

    def __setstate__(self, _): ...

    def __setitem__(self, _, __): ...

    def append(self, _): ...

    def extend(self, _): ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that is not read yet: `shape` and `strides` in elements, from element `offset` of storage `member`."""

    member: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Reader:
    """The tensors of one `torch.save` file that holds a dict: shapes and dtypes at once, values when asked for.

    A value that is no float tensor, as the framework states that training leaves behind, is there with the shape ()
    and a dtype of objects, and cannot be read. Raises ValueError for a file that is damaged or of another kind.
    """

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile):
        self._path, self._archive = path, archive
        self._verified: set[str] = set()
        self._reported: set[str] = set()
        (self._root,) = {name.split("/")[0] for name in archive.namelist()} or {""}
        if self._member("byteorder", b"little") != b"little":
            raise ValueError(f"{path}: numbers are big-endian; save it again on a common machine")
        found = self._unpickle()
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ValueError(f"{path} holds a {type(found).__name__}; wanted a dict from names to tensors")
        self._stored: dict[str, Any] = dict(found)
        known = {key: value for key, value in found.items() if isinstance(value, Stored)}
        self.shapes = {key: known[key].shape if key in known else () for key in found}
        self.dtypes = {key: known[key].dtype if key in known else np.dtype(object) for key in found}

    def read(self, key: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of its first axis, in the dtype in which it is stored.

        The archive's checksum of the storage is verified: by each reading of a whole tensor, by the first of rows.
        """
        tensor = self._stored[key]
        if not isinstance(tensor, Stored):
            raise ValueError(f"{self._path}: {key} is no tensor of {', '.join(STORAGES)}")
        place = self._place(tensor) if rows != slice(None) else None
        if place is None and rows != slice(None):
            self._report(key)
        if place is not None:
            return tensors.read_rows(self._path, place, tensor.shape, tensor.dtype, rows)
        flat = np.frombuffer(self._member(f"data/{tensor.member}"), tensor.dtype)
        last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
        if min(tensor.shape, default=1) > 0 and not (min((tensor.offset, *tensor.strides)) >= 0 and last < flat.size):
            raise ValueError(f"{self._path}: {key} reaches beyond its storage; the file is damaged, get it again")
        strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        whole = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
        return whole[rows] if tensor.shape else whole

    def _place(self, tensor: Stored) -> int | None:
        """The byte of the file at which a tensor starts that lies there row by row as it is; else None."""
        member = self._archive.getinfo(f"{self._root}/data/{tensor.member}")
        dense = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
        end = (tensor.offset + math.prod(tensor.shape)) * tensor.dtype.itemsize
        if member.compress_type != zipfile.ZIP_STORED or tensor.strides != dense or end > member.file_size:
            return None
        if member.filename not in self._verified:
            self._verify(member)
        with open(self._path, "rb") as file:
            file.seek(member.header_offset + 26)  # of the member's own header: the lengths of its name and extras
            name, extra = int.from_bytes(file.read(2), "little"), int.from_bytes(file.read(2), "little")
        return member.header_offset + 30 + name + extra + tensor.offset * tensor.dtype.itemsize

    def _report(self, key: str) -> None:
        if key not in self._reported:
            self._reported.add(key)
            logger.warning("%s: %s does not lie row by row as it is; each part of it reads the whole", self._path, key)

    def _verify(self, member: zipfile.ZipInfo) -> None:
        """Reads a member once, which compares its checksum, a little at a time."""
        try:
            with self._archive.open(member) as content:
                while content.read(1 << 24):
                    pass
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self._path}: {member.filename}: {error}; the file is damaged, get it again") from error
        self._verified.add(member.filename)

    def _member(self, name: str, default: bytes | None = None) -> bytes:
        full = f"{self._root}/{name}"
        if default is not None and full not in self._archive.namelist():
            return default
        try:
            return self._archive.read(full)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{self._path}: {full}: {error}; the file is damaged, get it again") from error

    def _unpickle(self) -> Any:
        content = self._member("data.pkl")
        try:
            return _Unpickler(io.BytesIO(content)).load()
        except Exception as error:  # damaged pickles raise anything, from an EOFError to a TypeError
            raise ValueError(f"{self._path}: data.pkl: {error!r}; the file is damaged, get it again") from error


@contextlib.contextmanager
def open_file(path: pathlib.Path) -> Iterator[Reader]:
    """A `Reader` of `path`, which is closed at the end."""
    with contextlib.ExitStack() as files:
        try:
            archive = files.enter_context(zipfile.ZipFile(path))
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} is no file of torch.save (torch 1.6 or newer): {error}; get it again, or save its tensors as "
                f"{path.with_suffix('.safetensors').name}"
            ) from error
        yield Reader(path, archive)


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors, and nothing else that the file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return known.get((module, name), Opaque)

    def persistent_load(self, pid: tuple) -> tuple[Any, str]:
        _, dtype, member, _, _ = pid
        return dtype, member


def _rebuild_tensor(storage: tuple[Any, str], offset: int, shape: tuple, strides: tuple, *_) -> Stored | Opaque:
    dtype, member = storage
    if not isinstance(dtype, np.dtype):
        return Opaque()  # integers and quantised numbers
    return Stored(member, dtype, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Stored | Opaque, *_) -> Stored | Opaque:
    return tensor
