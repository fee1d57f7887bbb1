"""Our own checkpoints of a model: one Orbax item for each parameter, layer by layer, and a manifest.

    manifest.json       configuration; shape, dtype and checksums of each parameter
    parameters/NAME/    the parameter as an Orbax item (`items`)

A parameter is written alone, so that conversion streams, and any part of it is read alone, so that each device gets its
shard and nothing more. Parameters have the names and shapes of `Llama4(scan=False)`; a stacked model is read from the
same files.

Two checksums: `crc32`, the sum of the CRC-32 of each chunk's place and bytes modulo 2^32, is for files; `sum` is
`store.fingerprint`, which devices compute on their shards.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama4_jax import config as configs
from llama4_jax.checkpoint import items, mapping, store, tensors
from llama4_jax.checkpoint.leaves import ModelLeaves, check_dtype, empty, parameter_shapes
from llama4_jax.config import Llama4Config
from llama4_jax.core import names, partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.model import Llama4

MANIFEST = "manifest.json"
PARAMETERS = "parameters"
FORMAT = "llama4_jax parameters, version 1"


def save_native(model: Llama4, folder) -> None:
    """Writes `model` to `folder`, in the dtype of its weights, a parameter at a time.

    All or nothing: files are written beside `folder` and renamed into place when complete. A checkpoint already there
    is replaced, other files in the folder (a tokenizer) are kept.
    """
    leaves = ModelLeaves(model)
    with tensors.replaced_folder(folder, is_ours) as staged, items.Writer() as writer:
        records = {
            path: writer.write(item(staged, path), spec, leaves.axis(path), functools.partial(leaves.window, path))
            for path, spec in leaves.specs.items()
        }
        write_manifest(staged, model.config, records)


def load_native(
    folder,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    *,
    placement: Placement = partitioning.TRAIN,
    scan: bool = True,
) -> Llama4:
    """The model in `folder`, with weights converted to `dtype` ("float32", "bfloat16", "float16"; None: as stored).

    With a `mesh` each parameter goes straight into the shards that `placement` gives it, and each process reads only what
    its devices hold, a shard at a time. `scan` as in `Llama4`.
    Raises FileNotFoundError for missing files, ValueError for a manifest that does not fit its own configuration (all
    of it in one message), for another format and where the bits of a parameter are not those that were saved.
    """
    check_dtype(dtype)
    leaves = NativeLeaves(folder)
    abstract = jax.eval_shape(lambda: Llama4(leaves.config, rngs=nnx.Rngs(0), scan=scan))
    graph, state = nnx.split(abstract)
    places = names.split(partitioning.shardings(abstract, placement, mesh))[1] if mesh else {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parameters = {".".join(map(str, path)): (path, parameter) for path, parameter in nnx.to_flat_state(state)}
    layers: dict[str, list[str]] = {path: [] for path in parameters}  # of a stacked parameter, in their order
    for path, (home, _) in mapping.unstacked(leaves.config, parameters).items():
        layers[home].append(path)
    filled = []
    for name, (path, parameter) in parameters.items():
        array = leaves.array(layers[name], parameter.shape, places.get(name, here))
        filled.append((path, parameter.replace(array if dtype is None else array.astype(dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


class NativeLeaves:
    """The parameters in `folder`, layer by layer (`leaves.Leaves`), converted to `dtype` (None: as stored)."""

    def __init__(self, folder, dtype: str | None = None):
        check_dtype(dtype)
        self._folder = pathlib.Path(folder)
        document = _read_manifest(self._folder)
        self.config = configs.from_dict(Llama4Config, document["config"])
        self.records: dict[str, items.Record] = document["parameters"]
        stored = {path: tuple(record["shape"]) for path, record in self.records.items()}
        shapes = parameter_shapes(self.config, stacked=False)
        mapping.account(mapping.identity(shapes), {"": stored}, shapes, f"checkpoint {folder}")
        self.specs = {
            path: (tuple(record["shape"]), np.dtype(dtype or record["dtype"])) for path, record in self.records.items()
        }

    def window(self, path: str, box: mapping.Box) -> np.ndarray:
        """A part of the parameter `path`."""
        values = items.open_array(item(self._folder, path))[box].read().result()
        return values.astype(self.specs[path][1], copy=False)

    def axis(self, path: str) -> int:
        """Along which axis windows are cheap."""
        chunk = items.open_array(item(self._folder, path)).chunk_layout.read_chunk.shape
        numbers = [size / step for size, step in zip(self.specs[path][0], chunk)]
        return numbers.index(max(numbers))

    def array(self, paths: list[str], shape: mapping.Shape, place: jax.sharding.Sharding) -> jax.Array:
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


def item(folder: pathlib.Path, path: str) -> pathlib.Path:
    """Where the parameter `path` of a checkpoint lies."""
    return pathlib.Path(folder) / PARAMETERS / path


def write_manifest(folder: pathlib.Path, config: Llama4Config, records: Mapping[str, items.Record]) -> None:
    document = {"format": FORMAT, "config": configs.to_dict(config), "parameters": dict(sorted(records.items()))}
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
