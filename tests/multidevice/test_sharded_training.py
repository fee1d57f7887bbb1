"""A training run on a mesh: the numbers of one device, in a checkpoint that resumes on any other mesh."""

import dataclasses
import functools
import os
import signal

import jax
import numpy as np
import optax
import pytest
from bigram import Bigram
from jax.sharding import NamedSharding, PartitionSpec
from tiny_run import CountingLoader

from llama4_jax.config import presets
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names, partitioning
from llama4_jax.train import loop, losses, metrics, optim, shards, step
from llama4_jax.train.state import create

pytestmark = pytest.mark.multidevice

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, epsilon=1e-2)


def run(folder, sizes, stop=None, **changes):
    """A bigram run of eight rows a batch on the mesh, or on one device without sizes; preempted after step `stop`."""
    config = TrainConfig(**{"steps": 8, "save_every": 2, "log_every": 1, "optimizer": OPTIMIZER} | changes)
    mesh = partitioning.make_mesh(sizes) if sizes else None
    model = Bigram()
    if mesh:
        model = jax.device_put(model, partitioning.shardings(model, partitioning.TRAIN, mesh))
    structure, params = names.split(model)
    optimizer = optim.make(config.optimizer, config.steps)
    objective = functools.partial(losses.next_token, config=config)
    take = step.make(structure, objective, optimizer, config, presets.tiny().text)
    kept = {}

    def strike(params, step):
        kept.update(params=jax.tree.map(lambda x: (x.sharding, x.addressable_shards[0].data.size), params))
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    state = create(params, optimizer)
    arguments = {"folder": folder, "mesh": mesh, "callbacks": [loop.Callback(1, strike)]}
    try:
        return loop.train(state, take, CountingLoader(batch=8), config, **arguments), kept["params"]
    except loop.Interrupted as interrupted:
        return interrupted.step, kept["params"]


def test_a_run_resumes_on_another_mesh_and_again_on_one_device_with_the_same_numbers(tmp_path):
    wanted, _ = run(tmp_path / "alone", None)
    reached, first = run(tmp_path / "moved", {"fsdp": 4, "expert": 2}, stop=2)
    assert reached == 3
    reached, second = run(tmp_path / "moved", {"data": 2, "tensor": 4}, stop=5)
    assert reached == 6
    last, third = run(tmp_path / "moved", None)
    sizes = [each["embed.table"][1] for each in (first, second, third)]
    assert sizes[0] < 32 * 8 and sizes[1] < 32 * 8 and sizes[2] == 32 * 8
    assert first["embed.table"][0].spec != second["embed.table"][0].spec

    lines = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("alone", "moved")]
    assert [line["step"] for line in lines[1]] == list(range(1, 9))
    losses = [[line["loss"] for line in each] for each in lines]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    for name, value in last.params.items():
        np.testing.assert_allclose(value, wanted.params[name], atol=1e-6, err_msg=name)


def test_moments_lie_where_their_parameters_do(tmp_path):
    state, _ = run(tmp_path, {"fsdp": 8})
    for name, parameter in state.params.items():
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == parameter.shape]
        assert len(moments) == 2 and {moment.sharding for moment in moments} == {parameter.sharding}, name


def test_no_step_after_the_first_compiles_anything(tmp_path):
    run(tmp_path, {"fsdp": 8}, save_every=100)
    compiling = [line["goodput/compile"] * line["wall_seconds"] for line in metrics.read(tmp_path / "metrics.jsonl")]
    assert compiling[0] > 0 and np.ptp(compiling) < 1e-9


def test_a_step_that_would_move_its_state_leaves_it_in_place_and_metrics_on_every_device():
    mesh = partitioning.make_mesh({"fsdp": 8})
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), (None, "fsdp")))
    state = create({"weight": jax.device_put(np.zeros((8, 8), np.float32), rows)}, optax.identity())
    state, batch = shards.place_state(state, mesh), {"new": jax.device_put(np.ones((8, 8), np.float32), columns)}
    move = jax.jit(lambda state, batch: (dataclasses.replace(state, params={"weight": 2 * batch["new"]}), batch))
    after, measured = shards.keep_places(move, state, mesh)(state, batch)
    assert after.params["weight"].sharding == rows and measured["new"].sharding.is_fully_replicated


@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_go_to_the_batch_axes_and_pictures_are_filled_up_and_split_too(accumulation):
    mesh = partitioning.make_mesh({"data": 2, "expert": 2, "context": 2})
    lead = (accumulation,) if accumulation > 1 else ()
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 9, (*lead, 4, 6)),
        "images": rng.normal(size=(*lead, 5, 2, 2, 3)).astype(np.float32),
    }
    placed = shards.place_batch(batch, mesh, accumulation)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["tokens"].addressable_shards[0].data.shape == (*lead, 1, 3)
    assert placed["images"].addressable_shards[0].data.shape == (*lead, 2, 2, 2, 3)
    pictures = np.moveaxis(np.asarray(placed["images"]), len(lead), 0)
    np.testing.assert_array_equal(pictures[:5], np.moveaxis(batch["images"], len(lead), 0))
    assert len(pictures) == 8 and not pictures[5:].any()
    assert shards.own_pictures(5, mesh) == range(5)  # of the only process


def test_rows_that_cannot_be_divided_are_an_error_that_says_what_would_do():
    mesh = partitioning.make_mesh({"fsdp": 4, "data": 2})
    with pytest.raises(ValueError, match="tokens of the batch: batch=6 is not divisible .* change rows"):
        shards.place_batch({"tokens": np.zeros((6, 4), np.int32)}, mesh)
