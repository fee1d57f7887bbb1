"""Pretraining in one call: from a fresh model, a loader and a configuration to a trained model."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from llama4_jax.config import Llama4Config, to_dict
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import names
from llama4_jax.core.partitioning import TRAIN, Placement
from llama4_jax.model import Llama4
from llama4_jax.tokenizer import Tokenizer
from llama4_jax.train import losses, optim, qat, step
from llama4_jax.train.feed import Loader
from llama4_jax.train.loop import Callback, train
from llama4_jax.train.state import create


def run(
    model: Llama4,
    loader: Loader,
    config: TrainConfig,
    *,
    folder: str | pathlib.Path,
    callbacks: Sequence[Callback] = (),
    records: Mapping[str, Any] | None = None,
    objective: Callable[..., losses.Terms] | None = None,
    mesh: Mesh | None = None,
    placement: Placement = TRAIN,
) -> Llama4:
    """Trains `model`, or resumes the run in `folder`, and returns the trained model; see `loop.train`.

    The arrays of `model` are given up. objective: `(model, batch, rng) -> losses.Terms`, by default the next-token
    loss with the weights of `config`. mesh: on which `model` was initialised or loaded, if on one; placement: how batches
    lie on it, such as `partitioning.LONG` for few and long rows. Callbacks get parameters by name:
    `core.names.split(model)[0].merge` makes a model of them, best inside the jitted function that uses it.

    With `config.qat` callbacks get parameters as products see them, and the model that is returned has them in few bits; the
    weights in full precision are in the last checkpoint.
    """
    structure, params = names.split(model)
    objective = objective or functools.partial(losses.next_token, config=config)
    optimizer = optim.make(config.optimizer, config.steps)
    state = train(
        create(qat.prepared(params, config.qat), optimizer, seed=config.seed),
        step.make(structure, objective, optimizer, config, model.config.text),
        loader,
        config,
        folder=folder,
        callbacks=[_seeing(callback, config) for callback in callbacks],
        records={"model_config": to_dict(model.config)} | dict(records or {}),
        mesh=mesh,
        placement=placement,
        chunk_size=model.config.text.attention.chunk_size,
    )
    return structure.merge(qat.packed(state.params, config.qat))


def _seeing(callback: Callback, config: TrainConfig) -> Callback:
    """A callback that gets what products see at its step, and attends as they do."""

    def run(params, step: int):
        with qat.cached(config.qat, step):
            return callback.run(qat.seen(params, config.qat, step), step)

    return dataclasses.replace(callback, run=run)


def for_tokenizer(config: Llama4Config, tokenizer: Tokenizer) -> Llama4Config:
    """`config` with the size of this tokenizer's vocabulary and the ids of its special tokens."""
    special = tokenizer.special
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size),
        patch_token=special["patch"],
        image_start_token=special["image_start"],
        image_end_token=special["image_end"],
        bos_token=tokenizer.bos,
        stop_tokens=tuple(tokenizer.stop),
    )
