"""Trains the small model in tests/quant/trained on real text: `python tests/quant/make_trained.py`, two minutes on 2 cores.

What rounding costs can only be seen on a model that has learnt something. It has both kinds of feed-forward and of attention;
weights are kept in bfloat16 as Hugging Face lays them out, its tokenizer beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax.numpy as jnp

from llama4_jax import checkpoint
from llama4_jax import tokenizer as tokenizers
from llama4_jax.config import Llama4Config, presets
from llama4_jax.config.data import DataConfig
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names
from llama4_jax.data import loader
from llama4_jax.testing import tiny
from llama4_jax.train import losses, optim, step
from llama4_jax.train.state import create

FOLDER = pathlib.Path(__file__).resolve().parent / "trained"
VOCABULARY = 400
DATA = DataConfig(images_per_batch=0, rows=8, sequence_length=128)
TRAIN = TrainConfig(steps=1000, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=50), balance_loss=0.01)


def config() -> Llama4Config:
    text = presets.tiny().text
    attention = dataclasses.replace(text.attention, head_dim=16, chunk_size=32, nope_interval=2)
    moe = dataclasses.replace(text.moe, expert_dim=64, top_k=1)
    text = dataclasses.replace(text, embed_dim=64, mlp_dim=64, num_layers=2, attention=attention, moe=moe)
    return Llama4Config(text=dataclasses.replace(text, vocab_size=VOCABULARY))


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.train(loader.tokenizer_texts(DATA, 200_000), VOCABULARY, FOLDER / "tokenizer.model")
    (FOLDER / "tokenizer.model.corpus").unlink()  # what it was trained on, for runs that go on
    batches = loader.make(DATA, tokenizer)
    structure, params = names.split(tiny.model(config()))
    optimizer = optim.make(TRAIN.optimizer, TRAIN.steps)
    objective = functools.partial(losses.next_token, config=TRAIN)
    state, run = create(params, optimizer, seed=0), step.make(structure, objective, optimizer, TRAIN, config().text)
    for number in range(TRAIN.steps):
        state, metrics = run(state, next(batches))
        if number % 50 == 49:
            print(f"step {number + 1}: loss {metrics['loss']:.3f}", flush=True)
    kept = {name: array.astype(jnp.bfloat16) for name, array in state.params.items()}
    checkpoint.save_hf(structure.merge(kept), FOLDER)


if __name__ == "__main__":
    main()
