"""Training with rows that devices share in zig-zag order: the numbers of one device and of rows kept whole."""

import dataclasses
import functools
import math
import os
import shutil
import signal

import jax
import numpy as np
import optax
import pytest
from tiny_run import CountingLoader, quick_model

from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names, partitioning
from llama4_jax.core.partitioning import LONG, TRAIN
from llama4_jax.testing import tiny
from llama4_jax.train import loop, losses, metrics, optim, shards, step
from llama4_jax.train.state import create

pytestmark = pytest.mark.multidevice

# Of four rows each has a device of its own, or two have four devices.
SIZES = {"train": {"fsdp": 4}, "long": {"fsdp": 2, "expert": 2, "context": 2}}
CHUNK = 5
# A large epsilon: otherwise a first step is the sign of the gradient, even of one that is nothing but rounding.
CONFIG = TrainConfig(
    steps=3,
    save_every=1,
    log_every=1,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, epsilon=1e-2),
)


class Pictured(CountingLoader):
    """Four rows of 48 tokens: two documents, padding, and three pictures, each in two of eight pieces, two in one row."""

    def __next__(self):
        batch = super().__next__()
        batch["tokens"][[0, 3], 3:7] = batch["tokens"][0, 39:43] = 31
        batch["images"] = np.random.default_rng(self.index).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
        return batch


def make_mesh(placement):
    sizes = SIZES[placement.name]
    return partitioning.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.fixture(scope="module")
def run():
    """`run(folder, placement, stop)`: parameters and means of gradients after three steps; one device without a placement.

    A chunked dense layer, then a global one with experts; chunks cross all borders. Preempted after step `stop`.
    """
    config = tiny.vision_config(num_layers=2, vocab_size=32, patch_token=31)
    attention = dataclasses.replace(config.text.attention, chunk_size=CHUNK)
    text = dataclasses.replace(config.text, attention=attention, moe=dataclasses.replace(config.text.moe, step=2))
    vision = dataclasses.replace(config.vision, num_layers=1)
    model = quick_model(dataclasses.replace(config, text=text, vision=vision))
    structure, _ = names.split(model)
    optimizer = optim.make(CONFIG.optimizer, CONFIG.steps)
    objective = functools.partial(losses.next_token, config=CONFIG)
    take = step.make(structure, objective, optimizer, CONFIG, model.config.text)
    weights = jax.tree.map(np.asarray, model)

    def run(folder, placement=None, stop=None):
        def strike(params, step):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        places, where = None, {}
        if placement:
            mesh = make_mesh(placement)
            places = partitioning.shardings(model, placement, mesh)
            where = {"mesh": mesh, "placement": placement, "chunk_size": CHUNK}
        state = create(names.split(jax.device_put(weights, places))[1], optimizer)
        loader, callbacks = Pictured(batch=4, time=48, vocab=31), [loop.Callback(1, strike)]
        after = loop.train(state, take, loader, CONFIG, folder=folder, callbacks=callbacks, **where)
        means = optax.tree_utils.tree_get(after.opt_state, "mu")
        return jax.tree.map(np.asarray, {"parameters": after.params, "gradients": means})

    return run


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Three runs to the end: their folder, with a checkpoint of each step, and what each ended with."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {
        name: run(folder / name, place) for name, place in (("alone", None), ("train", TRAIN), ("long", LONG))
    }


def losses_of(folder):
    return [line["loss"] for line in metrics.read(folder / "metrics.jsonl")]


def close(found, wanted):
    """To fp32 sums of at most a few thousand terms in another order; gradients by the largest of their array."""
    for name, value in found["parameters"].items():
        np.testing.assert_allclose(value, wanted["parameters"][name], atol=1e-5, err_msg=name)
    for name, value in found["gradients"].items():
        scale = np.abs(wanted["gradients"][name]).max() + 1e-6
        np.testing.assert_allclose(value / scale, wanted["gradients"][name] / scale, atol=1e-5, err_msg=name)


def test_three_steps_do_not_depend_on_who_holds_which_tokens(runs):
    folder, ended = runs
    for name in ("train", "long"):
        np.testing.assert_allclose(losses_of(folder / name), losses_of(folder / "alone"), rtol=1e-6)
        close(ended[name], ended["alone"])


def test_a_long_run_that_was_stopped_ends_with_the_same_bits(run, runs, tmp_path):
    with pytest.raises(loop.Interrupted):
        run(tmp_path, LONG, stop=1)
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path, LONG), runs[1]["long"])
    assert losses_of(tmp_path) == losses_of(runs[0] / "long")


@pytest.mark.thorough
def test_a_run_with_whole_rows_goes_on_with_shared_ones(run, runs, tmp_path):
    """From the first step's checkpoint; a checkpoint says nothing of placements."""
    shutil.copytree(runs[0] / "train" / "checkpoints" / "1", tmp_path / "checkpoints" / "1")
    close(run(tmp_path, LONG), runs[1]["alone"])


def test_tokens_lie_in_zigzag_order_over_expert_and_context_and_pictures_as_ever():
    mesh, batch = make_mesh(LONG), next(Pictured(batch=4, time=48, vocab=31))
    placed = shards.place_batch(batch, mesh, placement=LONG)
    first = placed["positions"].addressable_shards[0].data
    np.testing.assert_array_equal(first, batch["positions"][:2, [*range(6), *range(42, 48)]])
    assert placed["images"].addressable_shards[0].data.shape == (1, 16, 16, 3)  # three and one of zeros, over four
    np.testing.assert_array_equal(placed["images"][:3], batch["images"])
    stacked = {name: np.stack([array, array]) for name, array in batch.items()}
    again = shards.place_batch(stacked, mesh, 2, placement=LONG)
    np.testing.assert_array_equal(again["positions"][1], placed["positions"])


def test_documents_that_are_promised_to_be_aligned_are_looked_at():
    mesh, batch = make_mesh(LONG), next(Pictured(batch=4, time=48, vocab=31))
    promise = {"placement": dataclasses.replace(LONG, aligned=True), "chunk_size": 16}
    with pytest.raises(ValueError, match="a chunk of 16 positions crosses token 32 of row 0"):
        shards.place_batch(batch, mesh, **promise)
