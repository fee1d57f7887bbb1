"""A training run for one of several processes: `python spread_run.py FOLDER [--model bigram|llama] [--mesh AXES] ...`.

Without JAX_COORDINATOR_ADDRESS and its companions it is the same run in one process. Prints `step N` after each step. The project's top and tests/train must be on PYTHONPATH.
"""

import argparse
import functools
import os
import pathlib
import signal
import time

import jax
import numpy as np
from bigram import Bigram
from tiny_run import CountingLoader, quick_model

from llama4_jax.config import presets
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names, partitioning, processes
from llama4_jax.testing import tiny
from llama4_jax.train import loop, losses, optim, shards, step
from llama4_jax.train.state import create

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, epsilon=1e-2)


class Pictured(CountingLoader):
    """Counting, with three pictures a batch, of which only those in `drawn` are there, at the start of rows 0, 1 and 3."""

    def __init__(self, config, drawn: range, **changes):
        super().__init__(**changes)
        self.config, self.drawn = config, drawn

    def __next__(self):
        batch, vision = super().__next__(), self.config.vision
        images = np.random.default_rng(self.index).uniform(-1, 1, (3, vision.image_size, vision.image_size, 3))
        batch["images"] = np.stack([image * (i in self.drawn) for i, image in enumerate(images)]).astype(np.float32)
        batch["tokens"][[0, 1, 3], : vision.tokens_per_tile] = self.config.patch_token
        return batch


def assemble(kind: str, mesh):
    """A model on the mesh and the loader of its batches: eight rows, so that up to eight devices have one."""
    if kind == "bigram":
        model, loader = Bigram(), CountingLoader(batch=8)
    else:
        config = tiny.vision_config(num_layers=1, vocab_size=32, patch_token=31)
        model = quick_model(config)
        loader = Pictured(config, shards.own_pictures(3, mesh), batch=8, vocab=31)
    if mesh is not None:
        places = partitioning.shardings(model, partitioning.TRAIN, mesh)
        model = jax.tree.map(
            lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i: x[i]), model, places
        )
    return model, loader


def main(arguments) -> None:
    mesh = partitioning.make_mesh(shards.parse(arguments.mesh)) if arguments.mesh else None
    model, loader = assemble(arguments.model, mesh)
    config = TrainConfig(steps=arguments.steps, save_every=arguments.save_every, log_every=1, optimizer=OPTIMIZER)
    structure, params = names.split(model)
    optimizer = optim.make(config.optimizer, config.steps)
    objective = functools.partial(losses.next_token, config=config)
    text = model.config.text if arguments.model == "llama" else presets.tiny().text
    take = step.make(structure, objective, optimizer, config, text)

    def tell(params, step):
        print(f"step {step}", flush=True)
        if (jax.process_index(), step) == (arguments.victim, arguments.strike):
            while arguments.after and not (pathlib.Path(arguments.folder) / "checkpoints" / arguments.after).exists():
                time.sleep(0.02)
            os.kill(os.getpid(), getattr(signal, arguments.signal))
        if arguments.fail == step and jax.process_index() == 1:
            raise RuntimeError("this process alone has had enough")
        time.sleep(arguments.pace)

    callbacks = [loop.Callback(1, tell)]
    loop.train(create(params, optimizer), take, loader, config, folder=arguments.folder, callbacks=callbacks, mesh=mesh)
    print("done", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--model", default="bigram")
    parser.add_argument("--mesh")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save_every", type=int, default=3)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between steps")
    parser.add_argument("--victim", type=int, help="the process that sends itself --signal after step --strike")
    parser.add_argument("--strike", type=int)
    parser.add_argument("--after", help="a step whose checkpoint must be written before the strike")
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--fail", type=int, help="process 1 raises an error after this step")
    with processes.joined(os.environ):
        main(parser.parse_args())
