"""Checkpoints of a run in progress: written in the background, whole or not at all, and checked when read.

A store is a folder with one sub-folder a step. Each holds items: trees of arrays (`arrays`) and JSON values
(`records`). Orbax writes a step under a temporary name and renames it when complete, so a process killed at any moment
leaves only whole steps; a fingerprint of every array, taken on the device before writing, is compared on reading, so
a file damaged later is found out rather than trained on.

In a run of several processes all call every method, on a folder that all see: each writes and reads the parts of arrays that
its devices hold, process 0 writes the records, and a step counts as read only when everyone could read it. A step may be read
into any placement, whatever the one that it was saved from.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llama4_jax.core import processes

logger = logging.getLogger(__name__)

Tree = Any  # a pytree of arrays
_FINGERPRINTS = "fingerprints"


class CheckpointError(Exception):
    """No checkpoint of a folder that has some can be read."""


class MismatchError(ValueError):
    """The arrays saved are whole, but not those asked for."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """One step read back: the arrays and records that went into `Store.save`."""

    step: int
    arrays: dict[str, Tree]
    records: dict[str, Any]


class Store:
    """Numbered checkpoints under `folder`, the newest `keep` of them. Use it as a context manager.

    `read_only` is for a second process that looks on: it never creates, cleans up or renames anything.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 3, read_only: bool = False):
        self.folder = pathlib.Path(folder).absolute()
        self.read_only = read_only
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._reader = _reader()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        # After an error here alone, the other processes would not come to finish what they are writing together.
        if kind is None or issubclass(kind, SystemExit) or jax.process_count() == 1:
            self.close()

    def steps(self) -> list[int]:
        """The steps that are saved whole, oldest first. One that is still being written is not among them."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: Mapping[str, Tree], records: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied, so that they may be donated. Names must be distinct."""
        clashes = (set(arrays) & set(records)) | ({_FINGERPRINTS} & {*arrays, *records})
        if clashes:
            raise ValueError(f"item names {sorted(clashes)} are used twice or reserved; rename them")
        records = dict(records) | {_FINGERPRINTS: {name: fingerprint(tree) for name, tree in arrays.items()}}
        # Writing is later: copy what a caller may change meanwhile, and refuse what is not JSON here and now.
        records = json.loads(json.dumps(records))
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in records.items()}
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise CheckpointError(f"step {step} was not saved in {self.folder}; is the folder opened read-only?")

    def restore(self, like: Mapping[str, Tree | None]) -> Restored | None:
        """The newest step that can be read; None if none is saved.

        `like` names the items wanted and gives, for each, a tree of arrays or `jax.ShapeDtypeStruct`s whose shapes,
        dtypes and placement the result has. None instead of a tree: the item is a flat dict, read as it was saved to
        the default device. A damaged step is reported and, once an older one has been read instead, set aside as
        `STEP.damaged`. Raises CheckpointError when all are damaged, MismatchError when the arrays saved are not those
        of `like`.
        """
        self.wait()
        damaged: dict[int, str] = {}
        while (step := self._newest(below=min(damaged, default=None))) is not None:
            try:
                restored = self._read(step, like)
            except MismatchError:
                raise
            except Exception as error:  # damage surfaces as anything, from a KeyError to a storage error
                damaged[step] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                logger.warning("checkpoint %s/%d cannot be read: %s", self.folder, step, damaged[step])
                continue
            self._set_aside(damaged, used=step)
            return restored
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: {damaged}; move the folder to restart")
        return None

    def wait(self) -> None:
        """Blocks until everything handed to `save` is on disk; raises if that failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _newest(self, below: int | None) -> int | None:
        """The newest step saved, under `below` if that is given, as process 0 sees it."""
        steps = [step for step in self.steps() if below is None or step < below]
        step = int(processes.largest(steps[-1] if steps and processes.leading() else -1))
        return None if step < 0 else step

    def _read(self, step: int, like: Mapping[str, Tree | None]) -> Restored:
        failure = None
        try:
            arrays, records, prints = self._read_own(self.folder / str(step), like)
        except Exception as error:
            failure = error
        processes.fail_together(failure)
        for name, tree in arrays.items():
            _verify(name, prints[name], tree)
        return Restored(step, arrays, records)

    def _read_own(self, folder: pathlib.Path, like: Mapping[str, Tree | None]):
        """Arrays as far as this process holds them, records, and fingerprints; waits for nobody."""
        folders = [path for path in folder.iterdir() if path.is_dir()]
        json_items = [path.name for path in folders if path.name not in like and not (path / "_METADATA").exists()]
        records = {name: json.loads((folder / name / "metadata").read_text()) for name in json_items}
        prints = records.pop(_FINGERPRINTS)
        wanted = {name: _flat(prints[name]) if tree is None else tree for name, tree in like.items()}
        arrays = {}
        for name, tree in wanted.items():
            _check_same(name, prints[name], tree)
        for name, tree in wanted.items():
            restore = ocp.args.StandardRestore(jax.tree.map(_abstract, tree))
            arrays[name] = self._reader.restore(folder / name, args=restore)
        return arrays, records, prints

    def _set_aside(self, damaged: dict[int, str], *, used: int) -> None:
        for step in damaged if not self.read_only and processes.leading() else ():
            target = self.folder / f"{step}.damaged"
            while target.exists():
                target = target.with_name(target.name + "+")
            (self.folder / str(step)).rename(target)
            logger.warning("damaged checkpoint of step %d moved to %s; using step %d", step, target, used)
        processes.wait_for_all()  # after that all see it moved
        self._manager.reload()


def _reader() -> ocp.Checkpointer:
    """Reads for this process alone: one that finds damage must be able to say so while the others still read."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone)


def load_params(folder: str | pathlib.Path) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Parameters by dotted name, and the records, of the newest readable checkpoint in `folder`.

    Safe beside a running training process. Raises FileNotFoundError when the folder holds no checkpoint.
    """
    folder = pathlib.Path(folder)
    if folder.is_dir():
        with Store(folder, read_only=True) as store:
            restored = store.restore({"params": None})
        if restored:
            return restored.arrays["params"], restored.records
    raise FileNotFoundError(f"no checkpoint in {folder}; give the `checkpoints` folder of a run that has saved one")


def fingerprint(tree: Tree) -> dict[str, list]:
    """For each array of `tree`, by its path: shape, dtype and the sum of its words of bits modulo 2^32.

    One changed bit changes the sum, and neither layout nor sharding does, because integer addition has no rounding.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sums_of_bits([leaf for _, leaf in leaves]))
    return {_path(path): [list(leaf.shape), str(leaf.dtype), int(total)] for (path, leaf), total in zip(leaves, sums)}


@jax.jit
def _sums_of_bits(arrays: list[jax.Array]) -> list[jax.Array]:
    def total(array):
        if array.dtype == jnp.bool_:
            return jnp.sum(array, dtype=jnp.uint32)
        word = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[jax.dtypes.itemsize_bits(array.dtype)]
        return jnp.sum(jax.lax.bitcast_convert_type(array, word), dtype=jnp.uint32)

    return [total(array) for array in arrays]


def _check_same(item: str, prints: dict[str, list], tree: Tree) -> None:
    wanted = {_path(path): [list(x.shape), str(x.dtype)] for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    saved = {path: entry[:2] for path, entry in prints.items()}
    differences = [
        f"{path}: saved {saved.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in sorted({*wanted, *saved})
        if wanted.get(path) != saved.get(path)
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise MismatchError(
            f"checkpoint item {item!r} is not what this run has ({'; '.join(differences[:5])}{more}); "
            "use the configuration it was saved with, or a new folder"
        )


def _verify(item: str, prints: dict[str, list], tree: Tree) -> None:
    changed = [path for path, entry in fingerprint(tree).items() if prints[path] != entry]
    if changed:
        raise CheckpointError(f"{item}: the bits of {', '.join(changed[:3])} are not those that were saved")


def _flat(prints: dict[str, list]) -> dict[str, jax.ShapeDtypeStruct]:
    """The template of a flat dict from its fingerprints; a path is "['name']"."""
    return {path[2:-2]: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, (shape, dtype, _) in prints.items()}


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


_path = jax.tree_util.keystr
