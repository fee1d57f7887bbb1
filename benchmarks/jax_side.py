"""Our side of `hf_side_by_side`, run as a worker process: the library as a user calls it, nothing special-cased.

Weights come from the folder that transformers saved, through `checkpoint.load_hf`. Decoding is `infer.generate`, the
training step is `train.step` with its chunked cross-entropy.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, worker, workload
from llama4_jax import checkpoint, infer
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names
from llama4_jax.train import losses, optim, state, step

# transformers' AdamW decays every weight and does not clip; a norm that is never reached makes ours do the same work.
TRAIN = TrainConfig(
    steps=1_000_000,
    optimizer=OptimizerConfig(
        learning_rate=workload.ADAMW["lr"],
        warmup_steps=0,
        beta1=workload.ADAMW["betas"][0],
        beta2=workload.ADAMW["betas"][1],
        epsilon=workload.ADAMW["eps"],
        weight_decay=workload.ADAMW["weight_decay"],
        clip_norm=1e9,
    ),
)


class Ours:
    """A loaded checkpoint and the timed calls on it. `prepare` compiles and warms up a case, `run` times it once."""

    def __init__(self):
        self._cases = {}

    def load(self, folder: str, dtype: str) -> None:
        self._folder, self._dtype = folder, dtype
        self.model = checkpoint.load_hf(folder, dtype=dtype, scan=False)

    def logits(self, path: str) -> None:
        """Saves the float32 logits [b t v] of the shared prompt to `path`."""
        np.save(path, np.asarray(_forward(self.model, jnp.asarray(workload.prefill_tokens(), jnp.int32))))

    def prepare(self, case: str, variant: str) -> float:
        """Builds and warms up one case; returns the seconds that took, compilation included."""
        del variant  # there is one way
        started = time.perf_counter()
        build = {"prefill": self._prefill, "train": self._train}.get(case, self._decode)
        call = build(case)
        for _ in range(2):
            call()
        self._cases[case] = call
        return time.perf_counter() - started

    def run(self, case: str, variant: str) -> dict[str, float]:
        """Seconds of one repetition, by what was timed."""
        del variant
        return self._cases[case]()

    def release(self, case: str, variant: str) -> None:
        del variant
        self._cases.pop(case)

    def train_memory(self, variant: str) -> dict[str, float]:
        """Bytes resident at the peak of a warm training step, and the loss of the first step."""
        del variant
        self.model = None  # the step loads weights of its own, which it consumes
        call = self._train("train")
        loss = call()["loss"]
        call()
        machine.peak_memory_reset()
        idle = machine.resident_memory()
        call()
        return {"peak": machine.peak_memory(), "idle": idle, "loss": loss}

    def _prefill(self, case: str):
        tokens = jnp.asarray(workload.prefill_tokens(), jnp.int32)

        def call():
            with workload.timed() as timing:
                jax.block_until_ready(_forward(self.model, tokens))
            return timing

        return call

    def _decode(self, case: str):
        prompts = workload.prompts(batch=workload.decode_batch(case)).tolist()

        model = infer.prepare(self.model)  # once, as a server would

        def generate(count: int) -> float:
            with workload.timed() as timing:
                infer.generate(model, prompts, max_new_tokens=count)
            return timing["seconds"]

        return lambda: workload.decode_seconds(generate)

    def _train(self, case: str):
        model = checkpoint.load_hf(self._folder, dtype=self._dtype)
        structure, params = names.split(model)
        optimizer = optim.make(TRAIN.optimizer, TRAIN.steps)
        config = dataclasses.replace(TRAIN, compute_dtype=self._dtype)
        objective = functools.partial(losses.next_token, config=config)
        advance = step.make(structure, objective, optimizer, config, model.config.text)
        holder = [state.create(params, optimizer)]  # the step consumes the state it is given
        del model, params
        batch = _batch(workload.train_tokens())

        def call():
            with workload.timed() as timing:
                holder[0], metrics = jax.block_until_ready(advance(holder[0], batch))
            return timing | {"loss": float(metrics["loss"])}

        return call


@jax.jit
def _forward(model, tokens):
    return model(tokens).logits


def _batch(tokens: np.ndarray) -> dict[str, jax.Array]:
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    batch = {"tokens": inputs, "targets": targets, "positions": positions, "segments": np.ones_like(inputs)}
    return jax.tree.map(jnp.asarray, batch | {"loss_weights": np.ones(inputs.shape, np.float32)})


if __name__ == "__main__":
    side = Ours()
    calls = ("load", "logits", "prepare", "run", "release", "train_memory")
    worker.serve({name: getattr(side, name) for name in calls})
