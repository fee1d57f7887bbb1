"""Runs jobs in this process or in several, which end when this one does, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

# What the jobs of a worker process share; set once, when it starts.
_shared: list[Any] = []

Run = Callable[[Callable[[Any, Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]


@contextlib.contextmanager
def pool(count: int, shared: Any) -> Iterator[Run]:
    """Gives run(function, jobs), which yields (job, function(shared, job)) as they end, in any order.

    One worker is this process itself. Others are spawned, as a process with JAX or TensorFlow in it must not fork: the
    main module needs its `if __name__ == "__main__"`.
    """
    if count < 1:
        raise ValueError(f"wanted workers >= 1, got {count}")
    if count == 1:
        yield lambda function, jobs: ((job, function(shared, job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(count, context, _begin, (shared,)) as executor:
        yield lambda function, jobs: _as_completed(executor, function, jobs)


def _as_completed(executor: futures.Executor, function, jobs) -> Iterator[tuple[Any, Any]]:
    running = {executor.submit(_call, function, job): job for job in jobs}
    try:
        for future in futures.as_completed(running):
            yield running[future], future.result()
    finally:
        for future in running:
            future.cancel()  # after an error there is no use in the rest


def _begin(shared: Any) -> None:
    _shared.append(shared)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a killed program would wait for jobs for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable[[Any, Any], Any], job: Any) -> Any:
    return function(_shared[0], job)
