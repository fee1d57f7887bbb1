"""Batches on their way from the loader to the mesh; a wait for one is reported while it lasts, never silent."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from llama4_jax.core.partitioning import TRAIN, Placement
from llama4_jax.train import shards

logger = logging.getLogger(__name__)

# Seconds after which a wait for the next batch is reported.
_PATIENCE = 30.0


class Loader(Protocol):
    """An endless iterator over batches (dicts of numpy arrays) whose position is a JSON value."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Drawn(NamedTuple):
    """A batch on its mesh, and how many of its positions are not padding."""

    arrays: Mapping[str, Any]
    tokens: int


@dataclasses.dataclass(frozen=True)
class Feed:
    """Draws the loader's batches, `accumulation` for each step, and places them; see `shards.place_batch`."""

    loader: Loader
    accumulation: int
    mesh: Mesh | None
    placement: Placement = TRAIN
    chunk_size: int | None = None

    def draw(self, step: int) -> Drawn:
        """The next batch, or the next few stacked on a new leading axis."""
        try:
            with _reported(f"process {jax.process_index()} has waited {_PATIENCE:g} s for data after step {step}"):
                batches = [next(self.loader) for _ in range(self.accumulation)]
        except StopIteration:
            raise RuntimeError(f"the loader ended after step {step}; make it repeat, or lower train.steps") from None
        stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
        batch = batches[0] if self.accumulation == 1 else stacked
        options = {"placement": self.placement, "chunk_size": self.chunk_size}
        placed = shards.place_batch(batch, self.mesh, self.accumulation, **options)
        return Drawn(placed, int(np.count_nonzero(batch["segments"])))


@contextlib.contextmanager
def _reported(message: str) -> Iterator[None]:
    """Logs `message` if the block is not done in time, while it still waits: a stalled loader is never silent."""
    timer = threading.Timer(_PATIENCE, logger.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
