"""A training step with pictures, compiled for a mesh of this machine's devices: prints what it sends, by kind and axes.

One layer of text, 8 rows of 128 tokens and 16 pictures. A program of its own, so that what the compiler says can be read.
Command: python tests/multidevice/pictured_step.py fsdp=2,context=2,tensor=2
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp

from llama4_jax.config import presets
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import TRAIN
from llama4_jax.plan import count, hlo, programs
from llama4_jax.train import losses, optim, shards, state, step

PICTURES = 16


def lower(config, mesh) -> jax.stages.Lowered:
    train = TrainConfig(steps=10)
    structure, params = programs.abstract_params(config, jnp.float32, TRAIN, mesh)
    optimizer = optim.make(train.optimizer, train.steps)
    shapes = jax.eval_shape(functools.partial(state.create, optimizer=optimizer), params)
    shapes = programs.placed(shapes, state.shardings(shapes, {name: leaf.sharding for name, leaf in params.items()}))
    batch = programs.batch_shapes(1, 8, 128, TRAIN, mesh)
    images = (PICTURES, config.vision.image_size, config.vision.image_size, config.vision.channels)
    sharding = partitioning.sharding(("batch", "patch", "patch", "patch"), images, TRAIN, mesh)
    batch["images"] = jax.ShapeDtypeStruct(images, jnp.float32, sharding=sharding)
    with partitioning.use(mesh):
        advance = step.make(
            structure, functools.partial(losses.next_token, config=train), optimizer, train, config.text
        )
        return advance.lower(shapes, batch)


if __name__ == "__main__":
    config, mesh = presets.tiny(), partitioning.make_mesh(shards.parse(sys.argv[1]))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=1))
    sent = count.count(hlo.parse(lower(config, mesh).compile().as_text()), mesh.shape).wire
    print(json.dumps({" ".join(key): round(value) for key, value in sent.items()}))
