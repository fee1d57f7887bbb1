"""Our own checkpoints of a model: one Orbax item for each parameter, layer by layer, and a manifest.

    manifest.json       configuration; shape, dtype and checksums of each parameter; how those in few bits are held
    parameters/NAME/    the parameter as an Orbax item (`items`)

A parameter in few bits is two or three items: NAME.values, NAME.scales and, if it is asymmetric, NAME.offsets (`low_bit`).

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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama4_jax import config as configs
from llama4_jax.checkpoint import items, low_bit, mapping, store, tensors
from llama4_jax.checkpoint.leaves import Leaves, ModelLeaves, abstract, check_dtype, empty, parameter_shapes
from llama4_jax.checkpoint.low_bit import Held
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
        write_manifest(staged, leaves, records)


def load_native(
    folder,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    *,
    placement: Placement = partitioning.TRAIN,
    scan: bool = True,
) -> Llama4:
    """The model in `folder`, with weights converted to `dtype` ("float32", "bfloat16", "float16"; None: as stored).

    Parameters that were saved in few bits are so again, and stand for arrays of `dtype`. With a `mesh` each array goes
    straight into the shards that `placement` gives it, and each process reads only what its devices hold, a shard at a
    time. `scan` as in `Llama4`.
    Raises FileNotFoundError for missing files, ValueError for a manifest that does not fit its own configuration (all
    of it in one message), for another format and where the bits of a parameter are not those that were saved.
    """
    check_dtype(dtype)
    leaves = NativeLeaves(folder)
    homes = mapping.unstacked(leaves.config, parameter_shapes(leaves.config, stacked=scan))
    held = low_bit.stacked(homes, leaves.held_as(dtype))
    model = abstract(leaves.config, held, stacked=scan)
    structure, wanted = names.split(model)
    places = names.split(partitioning.shardings(model, placement, mesh))[1] if mesh else {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layers: dict[str, list[str]] = {}  # of a stacked array, in their order
    for path, (home, _) in mapping.unstacked(leaves.config, list(map(low_bit.stored_name, wanted))).items():
        layers.setdefault(home, []).append(path)
    filled = {}
    for name, leaf in wanted.items():
        stored = low_bit.stored_name(name)
        array = leaves.array(layers[stored], leaf.shape, places.get(name, here))
        keep = dtype is None or low_bit.split(stored, held)[1] is not None
        filled[name] = array if keep else array.astype(dtype)
    return structure.merge(filled)


class NativeLeaves:
    """The parameters in `folder`, layer by layer (`leaves.Leaves`), converted to `dtype` (None: as stored)."""

    def __init__(self, folder, dtype: str | None = None):
        check_dtype(dtype)
        self._folder = pathlib.Path(folder)
        document = _read_manifest(self._folder)
        self.config = configs.from_dict(Llama4Config, document["config"])
        self.records: dict[str, items.Record] = document["parameters"]
        self._saved = {path: Held.from_json(fields) for path, fields in document.get("quantised", {}).items()}
        self.held = self.held_as(dtype)
        stored = {path: tuple(record["shape"]) for path, record in self.records.items()}
        shapes = low_bit.in_parts(parameter_shapes(self.config, stacked=False), self.held)
        mapping.account(mapping.identity(shapes), {"": stored}, shapes, f"checkpoint {folder}")
        self._check_parts()
        self.specs = {
            path: (
                tuple(record["shape"]),
                jnp.dtype(record["dtype"] if self._in_few(path) else dtype or record["dtype"]),
            )
            for path, record in self.records.items()
        }

    def held_as(self, dtype: str | None) -> dict[str, Held]:
        """How parameters in few bits are held, standing for arrays of `dtype` (None: as stored)."""
        return {path: Held(how.spec, dtype or how.dtype) for path, how in self._saved.items()}

    def window(self, path: str, box: mapping.Box) -> np.ndarray:
        """A part of the parameter `path`."""
        return items.read(item(self._folder, path), box).astype(self.specs[path][1], copy=False)

    def _in_few(self, path: str) -> bool:
        return low_bit.split(path, self._saved)[1] is not None

    def _check_parts(self) -> None:
        """Raises ValueError listing parts whose dtypes are not those of their specs."""
        wanted = {f"{path}.{part}": how.part_dtype(part) for path, how in self._saved.items() for part in how.parts}
        wrong = [
            f"{name}: wanted {dtype}, got {self.records[name]['dtype']}"
            for name, dtype in wanted.items()
            if self.records[name]["dtype"] != str(dtype)
        ]
        if wrong:
            raise ValueError(
                f"checkpoint {self._folder}: parts are not what the manifest says of them:\n  " + "\n  ".join(wrong)
            )

    def axis(self, path: str) -> int:
        """Along which axis windows are cheap."""
        array = items.open_array(item(self._folder, path))
        numbers = [size / step for size, step in zip(array.shape, array.chunk_layout.read_chunk.shape)]
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


def write_manifest(folder: pathlib.Path, source: Leaves, records: Mapping[str, items.Record]) -> None:
    """The manifest of what was written of `source`."""
    document = {"format": FORMAT, "config": configs.to_dict(source.config), "parameters": dict(sorted(records.items()))}
    if source.held:
        document["quantised"] = {path: how.to_json() for path, how in sorted(source.held.items())}
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
