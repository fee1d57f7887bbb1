"""The training loop: one linear story of steps, reports, evaluations and checkpoints.

    resume -> [ step -> check -> report -> evaluate -> save ]* -> the trained state

A run is a folder. Killed at any moment, it goes on from its last checkpoint when the same command is run again, and
ends with the bits that it would have ended with undisturbed: the step is a function of the state and the batch alone,
and a checkpoint holds the state and the loader's position.

In a run of several processes each goes through the same story at the same steps; process 0 reports, and a signal that any
of them has received stops them all at one step (see `core.processes`).
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama4_jax.checkpoint.store import Store
from llama4_jax.config import to_dict
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import processes
from llama4_jax.core.partitioning import TRAIN, Placement
from llama4_jax.train import books, goodput, shards
from llama4_jax.train.books import Books
from llama4_jax.train.feed import Feed, Loader
from llama4_jax.train.goodput import Account
from llama4_jax.train.state import Params, TrainState

# Rollbacks in a row, without a new checkpoint between them, after which the fault is not in the data.
_MOST_ROLLBACKS = 5


@dataclasses.dataclass(frozen=True)
class Callback:
    """Something to do with the parameters every `every` steps and after the last one, such as an evaluation.

    `run(params, step)` must not keep or donate `params`; the numbers that it returns are reported with the metrics. Every
    process of a run calls it; what only process 0 does there, the others wait for.
    """

    every: int
    run: Callable[[Params, int], Mapping[str, Any] | None]


class NonFiniteError(FloatingPointError):
    """The loss or a gradient was not finite; `step` and `groups` say where. The checkpoints are untouched."""

    def __init__(self, message: str, *, step: int, groups: list[str]):
        super().__init__(message)
        self.step, self.groups = step, groups


class Interrupted(SystemExit):
    """Raised after a signal, once the state is saved; ends the process with the status of a process so ended."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(128 + signal_number)
        self.step = step


def train(
    state: TrainState,
    step_function: Callable[[TrainState, dict], tuple[TrainState, dict]],
    loader: Loader,
    config: TrainConfig,
    *,
    folder: str | pathlib.Path,
    callbacks: Sequence[Callback] = (),
    records: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    placement: Placement = TRAIN,
    chunk_size: int | None = None,
) -> TrainState:
    """Trains up to step `config.steps` and returns the state; resumes first if `folder` holds checkpoints.

    state: the state before step 0 (its arrays are given up); step_function: from `step.make`; records: JSON values,
    such as the model's configuration, kept in every checkpoint and compared on resuming; mesh: where the parameters of
    `state` lie, if not on one device; placement, chunk_size: how batches lie on it, see `shards.place_batch`. A checkpoint
    resumes on any other mesh and placement.
    Leaves `metrics.jsonl`, `tensorboard/` and `checkpoints/` in `folder`, which all processes of a run share.
    Raises NonFiniteError, and Interrupted on SIGTERM or SIGINT.
    """
    folder, account = pathlib.Path(folder), Account()
    state = shards.place_state(state, mesh)
    if mesh is not None:
        step_function = shards.keep_places(step_function, state, mesh, placement)
    records = {"train_config": to_dict(config)} | dict(records or {})
    with Store(folder / "checkpoints", keep=config.keep) as store, _Signals() as signals:
        restored = store.restore(books.arrays(state))
        step, feed = restored.step if restored else 0, Feed(loader, config.accumulation, mesh, placement, chunk_size)
        with Books(folder, store, loader, account, restored, config.steps) as book:
            if restored:
                state = books.state(restored)
                loader.set_state(restored.records["data"])
                book.say(f"resuming {folder} at step {step}{_changes(restored.records, records)}")
            elif config.on_nan == "rollback":
                book.save(state, step, records)  # so that there is always something to go back to
            account.charge("checkpoint")

            batch, rollbacks = None, 0
            while step < config.steps:
                batch = batch or feed.draw(step)
                account.charge("data")
                stop, programs = processes.largest(signals.received), goodput.programs_compiled()
                state, metrics = step_function(state, batch.arrays)
                account.charge("compile" if goodput.programs_compiled() > programs else "step")
                stop, tokens = int(stop), batch.tokens
                saving = (step + 1) % config.save_every == 0 or step + 1 == config.steps or stop
                # The next batch is made while the device works, unless the loader's position is about to be saved.
                batch = None if saving else feed.draw(step)
                # A device that is done by now has waited for some of that time.
                account.charge("data" if batch and metrics["finite"].is_ready() else "step")

                finite = bool(metrics["finite"])  # waits for the device
                account.charge("step")
                if not finite:
                    message, groups = _diagnosis(metrics, step)
                    rollbacks += 1
                    if config.on_nan == "stop" or rollbacks > _MOST_ROLLBACKS:
                        store.wait()
                        raise NonFiniteError(f"{message} {_advice(store, config)}", step=step, groups=groups)
                    restored = store.restore(books.arrays(state))
                    state, step = books.state(restored), restored.step
                    book.rewind(step, message)
                    continue
                step += 1
                book.count(tokens)
                if step % config.log_every == 0 or step == config.steps:
                    book.log(step, metrics)
                for callback in callbacks:
                    if step % callback.every == 0 or step == config.steps:
                        book.write(step, callback.run(state.params, step))
                if saving:
                    book.save(state, step, records)
                    rollbacks = 0
                if stop:
                    book.finish()
                    name = signal.Signals(stop).name
                    book.say(
                        f"{name}: saved step {step} of {config.steps} in {folder}; run the same command again to resume"
                    )
                    raise Interrupted(stop, step)
                book.pause_over()
            book.finish()
    return state


def _diagnosis(metrics: dict[str, jax.Array], step: int) -> tuple[str, list[str]]:
    values = jax.device_get(metrics)
    prefix = "grad_norm/"
    groups = [n.removeprefix(prefix) for n, v in values.items() if n.startswith(prefix) and not np.isfinite(v)]
    where = f"non-finite gradients in {', '.join(groups)}" if groups else "gradients finite"
    return f"step {step}: loss is {values['objective']}; {where}.", groups


def _advice(store: Store, config: TrainConfig) -> str:
    saved = store.steps()
    kept = f"The checkpoint of step {saved[-1]} is untouched" if saved else "No checkpoint had been saved"
    if config.on_nan == "rollback":
        return f"{kept}. {_MOST_ROLLBACKS} rollbacks in a row did not help: lower the learning rate or the clip norm."
    return f"{kept}. Use on_nan='rollback' to go on without this batch, or lower the learning rate."


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between the saved records and this run's, for a person to see."""
    changed = sorted(name for name, value in _leaves(new) if dict(_leaves(old)).get(name) != value)
    return f"; changed since it was saved: {', '.join(changed)}" if changed else ""


def _leaves(tree: Any, prefix: str = ""):
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree


class _Signals:
    """While open, the first SIGTERM or SIGINT is noted in `received` (its number); the second acts as it always did."""

    def __init__(self):
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        # Only the main thread may set handlers; a run in another one is stopped by whoever owns that thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number: int, _) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
