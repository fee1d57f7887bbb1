"""Which rows of a batch a process has to make: those that its own devices look at."""

from __future__ import annotations

from jax.sharding import Mesh

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import TRAIN, Placement


def own(count: int, length: int, mesh: Mesh | None, placement: Placement = TRAIN) -> list[int]:
    """Of `count` rows, all without a mesh. Where devices of several processes share the time of a row, each makes it whole.

    Raises ValueError where rows or time cannot be divided.
    """
    if mesh is None:
        return list(range(count))
    shape = (count, length)
    parts = partitioning.batch_sharding(shape, placement, mesh).addressable_devices_indices_map(shape).values()
    return sorted({row for rows, _ in parts for row in range(*rows.indices(count))})
