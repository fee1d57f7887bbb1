"""Where a training run lives on a mesh: its state in the parameters' shards, its batches by rows and time.

Each process holds the whole batch as numpy arrays (see `data.loader`), and gives its devices the parts that are theirs: the
arrays on the mesh are the same for any number of processes. Under a placement for long rows tokens lie in its order.

Pictures are split as rows of `TRAIN` are, by their number in the batch, for the vision tower costs much and knows nothing of
rows: the features then travel to the placeholders, wherever those are. Tiles of zeros fill them up to a whole number a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama4_jax.core import partitioning, processes
from llama4_jax.core.partitioning import TRAIN, Placement
from llama4_jax.kernels import attention
from llama4_jax.train.state import TrainState

Batch = Mapping[str, np.ndarray]
_PICTURES = ("batch", "height", "width", "channels")


def parse(text: str) -> dict[str, int]:
    """Sizes of mesh axes as a flag gives them: "fsdp=2,expert=-1"; raises ValueError for anything else."""
    try:
        return {axis.strip(): int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(
            f"wanted axes and sizes such as fsdp=2,expert=2, got {text!r}; -1 takes what is left"
        ) from None


def place_state(state: TrainState, mesh: Mesh | None) -> TrainState:
    """`state` placed for good, as a restored one is: otherwise the first step after resuming would be compiled anew.

    What lies on the mesh stays, and the rest (counters, keys) is copied to all of it. Raises ValueError where several
    processes have no mesh, on which alone they could share a state.
    """
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes train one model and no mesh was given; make one over all their devices with "
            'partitioning.make_mesh({"fsdp": -1})'
        )

    def place(leaf: jax.Array) -> jax.Array:
        if mesh is None:
            return jax.device_put(leaf, leaf.sharding)
        here = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if here else jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(place, state)


def place_batch(
    batch: Batch,
    mesh: Mesh | None,
    accumulation: int = 1,
    *,
    placement: Placement = TRAIN,
    chunk_size: int | None = None,
) -> Batch:
    """A batch of the loader on the mesh: rows and time as `placement` cuts and orders them, pictures as the module says.

    With `accumulation` > 1 every array has a leading axis of microbatches, which is not split. chunk_size: of the model's
    chunked layers, wanted where the placement promises `aligned` documents. Raises ValueError where rows or time cannot be
    divided, and as `kernels.attention.lay_out`.
    """
    if mesh is None:
        return batch
    lead = ("microbatch",) if accumulation > 1 else ()
    batch = attention.lay_out(batch, placement, mesh, chunk_size=chunk_size)
    return {name: _place(name, array, lead, placement, mesh) for name, array in batch.items()}


def _place(name: str, array: np.ndarray, lead: tuple[str, ...], placement: Placement, mesh: Mesh) -> jax.Array:
    axes, rule = lead + partitioning.BATCH_AXES, placement
    if name == "images":
        surplus = -array.shape[len(lead)] % _ways(mesh)
        array = np.pad(array, [(0, surplus if axis == len(lead) else 0) for axis in range(array.ndim)])
        axes, rule = lead + _PICTURES, TRAIN
    try:
        sharding = partitioning.sharding(axes, array.shape, rule, mesh)
    except ValueError as error:
        raise ValueError(f"{name} of the batch: {error}; change rows or sequence_length, or the mesh") from None
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def own_pictures(count: int, mesh: Mesh | None) -> range:
    """Which of a batch's `count` pictures the devices of this process look at: only these need be drawn."""
    if mesh is None:
        return range(count)
    ways = _ways(mesh)
    padded = count + -count % ways
    sharding = partitioning.sharding(_PICTURES, (padded, 1, 1, 1), TRAIN, mesh)
    parts = [index[0].indices(padded) for index in sharding.addressable_devices_indices_map((padded, 1, 1, 1)).values()]
    return range(min(start for start, _, _ in parts), min(count, max(stop for _, stop, _ in parts)))


def _ways(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in TRAIN.table["batch"])


def keep_places(step_function: Callable, state: TrainState, mesh: Mesh, placement: Placement = TRAIN) -> Callable:
    """`step_function` with its state where `state` is, step after step, and its metrics whole on every device.

    Left to itself the compiler may divide what comes out of a step unlike what went in, and the next step would be
    compiled anew. Processes begin the first step together, however long each has compiled: one that is ahead would give up
    on the others, since new connections wait half a minute and no longer.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(step_function, out_shardings=(places, whole), donate_argnums=0)
    compiled = []

    def take(state: TrainState, batch: Batch):
        with partitioning.use(mesh, placement):
            if not compiled:
                compiled.append(step.lower(state, batch).compile())
                processes.wait_for_all()
            return step(state, batch)

    return take
