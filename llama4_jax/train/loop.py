"""The training loop: one linear story of steps, reports, evaluations and checkpoints.

    resume -> [ step -> check -> report -> evaluate -> save ]* -> the trained state

A run is a folder. Killed at any moment, it goes on from its last checkpoint when the same command is run again, and
ends with the bits that it would have ended with undisturbed: the step is a function of the state and the batch alone,
and a checkpoint holds the state and the loader's position.
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from llama4_jax.checkpoint.store import Restored, Store
from llama4_jax.config import to_dict
from llama4_jax.config.train import TrainConfig
from llama4_jax.train.metrics import Reporter, Stopwatch
from llama4_jax.train.state import Params, TrainState

# Rollbacks in a row, without a new checkpoint between them, after which the fault is not in the data.
_MOST_ROLLBACKS = 5


class Loader(Protocol):
    """An endless iterator over batches (dicts of numpy arrays) whose position is a JSON value."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Callback:
    """Something to do with the parameters every `every` steps and after the last one, such as an evaluation.

    `run(params, step)` must not keep or donate `params`; the numbers that it returns are reported with the metrics.
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
) -> TrainState:
    """Trains up to step `config.steps` and returns the state; resumes first if `folder` holds checkpoints.

    state: the state before step 0 (its arrays are given up); step_function: from `step.make`; records: JSON values,
    such as the model's configuration, kept in every checkpoint and compared on resuming.
    Leaves `metrics.jsonl`, `tensorboard/` and `checkpoints/` in `folder`.
    Raises NonFiniteError, and Interrupted on SIGTERM or SIGINT.
    """
    folder = pathlib.Path(folder)
    # As a restored state is: placed for good. Otherwise the first step after resuming would be compiled anew.
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)
    records = {"train_config": to_dict(config)} | dict(records or {})
    with Store(folder / "checkpoints", keep=config.keep) as store, _Signals() as signals:
        restored = store.restore(_arrays(state))
        progress = restored.records["progress"] if restored else {}
        step, watch = restored.step if restored else 0, Stopwatch(**progress)
        report = Reporter(folder, step=step, steps=config.steps)
        try:
            if restored:
                state = _state(restored)
                loader.set_state(restored.records["data"])
                report.say(f"resuming {folder} at step {step}{_changes(restored.records, records)}")
            elif config.on_nan == "rollback":
                _save(store, state, step, loader, watch, records)  # so that there is always something to go back to

            batch, rollbacks = None, 0
            while step < config.steps:
                batch = _draw(loader, config.accumulation, step) if batch is None else batch
                tokens = int(np.count_nonzero(batch["segments"]))
                state, metrics = step_function(state, batch)
                saving = (step + 1) % config.save_every == 0 or step + 1 == config.steps or signals.received is not None
                # The next batch is made while the device works, unless the loader's position is about to be saved.
                batch = None if saving else _draw(loader, config.accumulation, step)

                if not metrics["finite"]:  # waits for the device
                    message, groups = _diagnosis(metrics, step)
                    rollbacks += 1
                    if config.on_nan == "stop" or rollbacks > _MOST_ROLLBACKS:
                        raise NonFiniteError(f"{message} {_advice(store, config)}", step=step, groups=groups)
                    restored = store.restore(_arrays(state))
                    state, step = _state(restored), restored.step
                    report.rewind(step)
                    report.write(step, {"rollback": message})
                    report.say(f"{message} Rolled back to step {step}; that batch is skipped.")
                    watch.skip()
                    continue
                step += 1
                watch.count(tokens)
                report.advance()

                if step % config.log_every == 0 or step == config.steps:
                    _log(report, step, metrics, watch)
                for callback in callbacks:
                    if step % callback.every == 0 or step == config.steps:
                        report.write(step, callback.run(state.params, step))
                if saving:
                    _save(store, state, step, loader, watch, records)
                    rollbacks = 0
                if saving and signals.received is not None:
                    store.wait()
                    report.say(
                        f"{signals.received.name}: saved step {step} of {config.steps} in {folder}; "
                        "run the same command again to resume"
                    )
                    raise Interrupted(signals.received, step)
                watch.skip()
        finally:
            report.close()
    return state


def _arrays(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: parameters stand alone, so that a reader need not know the optimiser."""
    return {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state, "rng": state.rng}}


def _state(restored: Restored) -> TrainState:
    params, rest = restored.arrays["params"], restored.arrays["optimizer"]
    return TrainState(step=rest["step"], params=params, opt_state=rest["state"], rng=rest["rng"])


def _save(store: Store, state: TrainState, step: int, loader: Loader, watch: Stopwatch, records: dict) -> None:
    progress = {"seconds": watch.seconds, "tokens": watch.tokens}
    store.save(step, _arrays(state), {"data": loader.get_state(), "progress": progress} | records)


def _draw(loader: Loader, count: int, step: int) -> dict[str, np.ndarray]:
    """The next batch, or the next `count` stacked on a new leading axis."""
    try:
        batches = [next(loader) for _ in range(count)]
    except StopIteration:
        raise RuntimeError(f"the loader ended after step {step}; make it repeat, or lower train.steps") from None
    return batches[0] if count == 1 else {name: np.stack([b[name] for b in batches]) for name in batches[0]}


def _log(report: Reporter, step: int, metrics: dict[str, jax.Array], watch: Stopwatch) -> None:
    values = jax.device_get({name: value for name, value in metrics.items() if name != "finite"})
    rate = watch.lap()
    report.show(float(values["loss"]), rate)
    report.write(step, values | {"tokens": watch.tokens, "seconds": watch.seconds, "tokens_per_second": rate})


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
    """While open, the first SIGTERM or SIGINT is noted in `received`; the second acts as it always did."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        # Only the main thread may set handlers; a run in another one is stopped by whoever owns that thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number: int, _) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
