"""One run in several processes: how they find each other, agree, and end together.

Every process runs the same program on devices of its own, and arrays lie across them all. What one decides alone (a
signal came, a file is damaged) the others must learn before the next collective operation, or all wait for ever. In a
run of one process every function here costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# A host that dies without a word is noticed within half a minute; one that evaluates while others are done is no corpse.
_SILENCE_SECONDS, _GOODBYE_SECONDS = 30, 3600


class AnotherProcessError(RuntimeError):
    """A process other than this one failed at what all had to do."""


@contextlib.contextmanager
def joined(environment: Mapping[str, str], *, cluster: bool = False) -> Iterator[None]:
    """Joins the other processes of the run for the length of a `with` block. No device may have been touched before.

    environment: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, as
    `launch/local.py` sets them; without any of them, and without `cluster`, the process is alone.
    cluster: let JAX find them out, which it can on TPU pods, under Slurm and under Open MPI.

    An error in the block ends the process at once, after its traceback: the others wait in a collective operation, and a
    polite goodbye would wait for them. Raises ValueError for an incomplete environment.
    """
    if not cluster and not {ADDRESS, COUNT, INDEX} & set(environment):
        yield
        return
    _connect(environment, cluster)
    try:
        yield
    except SystemExit:  # all were asked to stop, and all do
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    else:
        # Waits for the others, so that nobody loses process 0, which all talk to.
        jax.distributed.shutdown()


def _connect(environment: Mapping[str, str], cluster: bool) -> None:
    # What CPU devices talk through; accelerators do not look at it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timeouts = {"heartbeat_timeout_seconds": _SILENCE_SECONDS, "shutdown_timeout_seconds": _GOODBYE_SECONDS}
    if cluster:
        jax.distributed.initialize(**timeouts)
        return
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in environment]
    if missing:
        raise ValueError(
            f"wanted {ADDRESS}, {COUNT} and {INDEX}, got no {' and no '.join(missing)}; set all three, or none to run alone"
        )
    count, index = int(environment[COUNT]), int(environment[INDEX])
    jax.distributed.initialize(environment[ADDRESS], count, index, **timeouts)


def leading() -> bool:
    """Whether this process is the one that writes reports and records."""
    return jax.process_index() == 0


def largest(value: int) -> jax.Array | np.ndarray:
    """The largest of the values that the processes give, int32 []. All must call it; `int()` waits for the answer."""
    if jax.process_count() == 1:
        return np.int32(value)
    mesh, find = _one_device_each()
    split = NamedSharding(mesh, PartitionSpec("process"))
    with jax.set_mesh(mesh):
        values = jax.make_array_from_callback((mesh.size,), split, lambda _: np.full(1, value, np.int32))
        return find(values)


def wait_for_all() -> None:
    """Returns in every process once all have called it, however late the last."""
    int(largest(0))


def fail_together(error: Exception | None) -> None:
    """Raises `error` if there is one, and AnotherProcessError if only another process has one. All must call it."""
    failed = int(largest(error is not None))
    if error is not None:
        raise error
    if failed:
        raise AnotherProcessError("another process failed here; its output says why")


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """A block that process 0 goes through before the others do, for files that the first writes and the rest read.

    If it fails there, it fails everywhere.
    """
    error = None
    if not leading():
        fail_together(None)
    try:
        yield
    except Exception as raised:
        error = raised
    if leading():
        fail_together(error)
    elif error is not None:
        raise error


def whole(tree: Any) -> Any:
    """The arrays of `tree` as numpy arrays, whole in each process. All must call it."""
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_addressable for leaf in leaves if isinstance(leaf, jax.Array)):
        meshes = {leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)}
        (mesh,) = meshes
        tree = _copied(mesh)(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _copied(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _one_device_each():
    """A mesh of the first device of each process, and the maximum over it."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh([first[index] for index in sorted(first)], ("process",), axis_types=(AxisType.Auto,))
    return mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
