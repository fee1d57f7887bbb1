"""Our own checkpoints of a model: one Orbax item for each parameter, layer by layer, and a manifest.

    manifest.json             configuration; shape, dtype and checksums of each parameter
    parameters/NAME/array     an Orbax item {"array": parameter}, in uncompressed zarr chunks of about CHUNK_BYTES

A parameter is written alone, so that conversion streams, and any part of it is read alone, so that each device gets its
shard and nothing more. Parameters have the names and shapes of `Llama4(scan=False)`; a stacked model is read from the
same files. Orbax writes; reading is by tensorstore, which Orbax reads with too, because Orbax restores whole arrays only.

Two checksums: `crc32` is of the bytes, chunk after chunk; `sum` is `store.fingerprint`, which devices compute on shards.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx

from llama4_jax import config as configs
from llama4_jax.checkpoint import mapping, store, tensors
from llama4_jax.checkpoint.leaves import ModelLeaves, check_dtype, empty, parameter_shapes, whole
from llama4_jax.config import Llama4Config
from llama4_jax.model import Llama4

MANIFEST = "manifest.json"
PARAMETERS = "parameters"
FORMAT = "llama4_jax parameters, version 1"
CHUNK_BYTES = 1 << 24  # above it, tensorstore copies much of a parameter while it writes
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}

Sharding = jax.sharding.Sharding
Record = dict[str, Any]  # what the manifest says of a parameter: shape, dtype, crc32, sum


def save_native(model: Llama4, folder) -> None:
    """Writes `model` to `folder`, in the dtype of its weights, a parameter at a time.

    All or nothing: files are written beside `folder` and renamed into place when complete. A checkpoint already there
    is replaced, other files in the folder (a tokenizer) are kept.
    """
    leaves = ModelLeaves(model)
    with tensors.replaced_folder(folder, is_ours) as staged, Writer(staged) as writer:
        records = {
            path: writer.write(path, leaves.window(path, whole(shape))) for path, (shape, _) in leaves.specs.items()
        }
        write_manifest(staged, model.config, records)


def load_native(
    folder,
    dtype: str | None = None,
    sharding: Callable[[str, mapping.Shape], Sharding | None] | None = None,
    *,
    scan: bool = True,
) -> Llama4:
    """The model in `folder`, with weights converted to `dtype` ("float32", "bfloat16", "float16"; None: as stored).

    `sharding`, given the dotted name and the shape of a parameter of the model, says where it goes (None: the default
    device). Each process reads only what its devices hold, a shard at a time. `scan` as in `Llama4`.
    Raises FileNotFoundError for missing files, ValueError for a manifest that does not fit its own configuration (all
    of it in one message), for another format and where the bits of a parameter are not those that were saved.
    """
    check_dtype(dtype)
    leaves = NativeLeaves(folder)
    graph, state = nnx.split(jax.eval_shape(lambda: Llama4(leaves.config, rngs=nnx.Rngs(0), scan=scan)))
    parameters = {".".join(map(str, path)): (path, parameter) for path, parameter in nnx.to_flat_state(state)}
    layers: dict[str, list[str]] = {path: [] for path in parameters}  # of a stacked parameter, in their order
    for path, (home, _) in mapping.unstacked(leaves.config, parameters).items():
        layers[home].append(path)
    filled = []
    for name, (path, parameter) in parameters.items():
        place = (sharding and sharding(name, parameter.shape)) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        array = leaves.array(layers[name], parameter.shape, place)
        filled.append((path, parameter.replace(array if dtype is None else array.astype(dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


class NativeLeaves:
    """The parameters in `folder`, layer by layer (`leaves.Leaves`), converted to `dtype` (None: as stored)."""

    def __init__(self, folder, dtype: str | None = None):
        check_dtype(dtype)
        self._folder = pathlib.Path(folder)
        document = _read_manifest(self._folder)
        self.config = configs.from_dict(Llama4Config, document["config"])
        self.records: dict[str, Record] = document["parameters"]
        stored = {path: tuple(record["shape"]) for path, record in self.records.items()}
        shapes = parameter_shapes(self.config, stacked=False)
        mapping.account(mapping.identity(shapes), {"": stored}, shapes, f"checkpoint {folder}")
        self.specs = {
            path: (tuple(record["shape"]), np.dtype(dtype or record["dtype"])) for path, record in self.records.items()
        }

    def window(self, path: str, box: mapping.Box) -> np.ndarray:
        """A part of the parameter `path`."""
        values = open_array(self._folder, path)[box].read().result()
        return values.astype(self.specs[path][1], copy=False)

    def array(self, paths: list[str], shape: mapping.Shape, place: Sharding) -> jax.Array:
        """The parameter of `paths`, or those of several layers on a new first axis, as `place` divides it, as stored."""
        alone = shape == self.specs[paths[0]][0]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            box = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape))
            if alone:
                return self.window(paths[0], box)
            block = empty(tuple(part.stop - part.start for part in box), self.specs[paths[0]][1])
            for row, path in enumerate(paths[box[0]]):
                block[row] = self.window(path, box[1:])
            return block

        array = jax.make_array_from_callback(shape, place, read)
        ((_, _, total),) = store.fingerprint([array]).values()
        if total != sum(self.records[path]["sum"] for path in paths) % 2**32:
            raise ValueError(
                f"{self._folder}: the bits of {', '.join(paths)} are not those that were saved; the files are damaged, "
                "convert or copy them again"
            )
        return array


class Writer:
    """Writes parameters of a checkpoint in `folder`, one at a time. Use it as a context manager."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._device = jax.local_devices(backend="cpu")[0]
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)
        self._checkpointer = ocp.Checkpointer(handler)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    def write(self, path: str, leaf: np.ndarray) -> Record:
        """Writes `leaf`, which nobody may change meanwhile, over what was there; returns its record."""
        # An expert is a chunk or more of its own: devices and other layouts ask for experts one by one.
        options = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if ".experts." in path else ())
        save = ocp.args.PyTreeSave({"array": jax.device_put(leaf, self._device)}, save_args={"array": options})
        self._checkpointer.save((self._folder / PARAMETERS / path).absolute(), args=save, force=True)
        crc32, total = _checksums(leaf.__getitem__, leaf.shape, _chunk(open_array(self._folder, path)))
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "crc32": crc32, "sum": total}


def stored_record(folder: pathlib.Path, path: str) -> Record:
    """The record of a parameter as it is on disk now; raises ValueError where it cannot be read."""
    array = open_array(folder, path)
    try:
        crc32, total = _checksums(lambda box: array[box].read().result(), array.shape, _chunk(array))
    except ValueError as error:
        raise ValueError(f"{folder}: {path} cannot be read: {error}") from error
    return {"shape": list(array.shape), "dtype": str(array.dtype.numpy_dtype), "crc32": crc32, "sum": total}


def open_array(folder: pathlib.Path, path: str) -> tensorstore.TensorStore:
    """The stored parameter `path`, of which any part can be read."""
    place = (pathlib.Path(folder) / PARAMETERS / path / "array").absolute()
    if not (place / "zarr.json").is_file():
        raise FileNotFoundError(f"{place / 'zarr.json'} is missing; the checkpoint is incomplete, copy it again")
    kvstore = {"driver": "file", "path": f"{place}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}).result()


def write_manifest(folder: pathlib.Path, config: Llama4Config, records: Mapping[str, Record]) -> None:
    document = {"format": FORMAT, "config": configs.to_dict(config), "parameters": dict(records)}
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")


def is_ours(path: pathlib.Path) -> bool:
    """Whether a file or folder belongs to a checkpoint of this kind, and so goes when that is replaced."""
    return path.name in (MANIFEST, PARAMETERS)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder / MANIFEST} is missing; a checkpoint of ours has one")
    document = json.loads((folder / MANIFEST).read_text())
    if document.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: wanted format {FORMAT!r}, got {document.get('format')!r}")
    return document


def _checksums(
    read: Callable[[mapping.Box], np.ndarray], shape: mapping.Shape, chunk: mapping.Shape
) -> tuple[int, int]:
    """CRC-32 of the bytes chunk by chunk, first axis outermost; sum of the words modulo 2^32."""
    crc32 = total = 0
    for box in _grid(shape, chunk):
        flat = np.ascontiguousarray(read(box)).reshape(-1)
        crc32 = zlib.crc32(flat.view(np.uint8).data, crc32)
        total += int(flat.view(WORDS[flat.dtype.itemsize]).sum(dtype=np.uint64))
    return crc32, total % 2**32


def _grid(shape: mapping.Shape, chunk: mapping.Shape) -> Iterator[mapping.Box]:
    axes = [[slice(at, min(at + step, size)) for at in range(0, size, step)] for size, step in zip(shape, chunk)]
    return itertools.product(*axes)


def _chunk(array: tensorstore.TensorStore) -> mapping.Shape:
    return array.chunk_layout.read_chunk.shape
