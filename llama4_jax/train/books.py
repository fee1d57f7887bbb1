"""What a run writes down about itself: metrics, checkpoints, and where its time went."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from llama4_jax.checkpoint.store import Restored, Store
from llama4_jax.core import processes
from llama4_jax.train import goodput
from llama4_jax.train.feed import Loader
from llama4_jax.train.goodput import Account
from llama4_jax.train.metrics import Reporter, Silent, Stopwatch, read
from llama4_jax.train.state import TrainState


def arrays(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: parameters stand alone, so that a reader need not know the optimiser."""
    return {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state, "rng": state.rng}}


def state(restored: Restored) -> TrainState:
    """The state whose `arrays` were saved."""
    params, rest = restored.arrays["params"], restored.arrays["optimizer"]
    return TrainState(step=rest["step"], params=params, opt_state=rest["state"], rng=rest["rng"])


class Books:
    """The books of a run in `folder`, opened at its start or at a checkpoint. Use them as a context manager.

    Every process keeps them; process 0 alone reports.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        store: Store,
        loader: Loader,
        account: Account,
        restored: Restored | None,
        steps: int,
    ):
        """account: charged by whoever works; steps: of the whole run."""
        self._store, self._loader, self._account = store, loader, account
        step, progress = (restored.step, restored.records["progress"]) if restored else (0, {})
        last = read(folder / "metrics.jsonl")[-1:]
        if restored:
            account.resume(progress.get("spent", {}), goodput.recorded(last[0]) if last else {})
        self._watch = Stopwatch(seconds=progress.get("seconds", 0.0), tokens=progress.get("tokens", 0))
        self._report = Reporter(folder, step=step, steps=steps) if processes.leading() else Silent()
        self.say = self._report.say

    def __enter__(self) -> Books:
        return self

    def __exit__(self, *_) -> None:
        self._report.close()

    def count(self, tokens: int) -> None:
        """A step was taken, with so many tokens."""
        self._watch.count(tokens)
        self._report.advance()

    def pause_over(self) -> None:
        """What came since the last step was counted (evaluation, saving) is no time of training."""
        self._watch.skip()

    def log(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """One line of metrics, with rates, the longest wait for data and the account's fractions."""
        values = jax.device_get({name: value for name, value in metrics.items() if name != "finite"})
        rate = self._watch.lap()
        # Of the process that waited longest: the others wait for it in the step.
        waited = int(processes.largest(round(1000 * self._account.lap("data")))) / 1000
        self._report.show(float(values["loss"]), rate)
        more = {"tokens": self._watch.tokens, "seconds": self._watch.seconds, "tokens_per_second": rate}
        self._report.write(step, values | more | {"data_wait": waited} | self._account.fractions())
        self._account.charge("other")

    def write(self, step: int, values: Mapping[str, Any] | None) -> None:
        """What an evaluation found, and the time that it took."""
        self._report.write(step, values)
        self._account.charge("evaluate")

    def save(self, state: TrainState, step: int, records: Mapping[str, Any]) -> None:
        """Starts a checkpoint of the state, the loader's position, this account and `records`."""
        self._account.saved()
        watch, spent = self._watch, self._account.spent
        progress = {"seconds": watch.seconds, "tokens": watch.tokens, "spent": spent}
        self._store.save(step, arrays(state), {"data": self._loader.get_state(), "progress": progress} | dict(records))
        self._account.charge("checkpoint")

    def rewind(self, step: int, message: str) -> None:
        """The run was rolled back to `step` for the reason that `message` gives."""
        self._account.lose()
        self._report.rewind(step)
        self._report.write(step, {"rollback": message})
        self.say(f"{message} Rolled back to step {step}; that batch is skipped.")
        self._watch.skip()
        self._account.charge("checkpoint")

    def finish(self) -> None:
        """Waits until everything is on disk; says where the time went, if any was spent on steps by this process."""
        self._store.wait()
        self._account.charge("checkpoint")
        if self._account.worked:
            self.say(self._account.table())
