"""One model over eight devices: made and loaded into its shards, and the same numbers as on one device."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest

from llama4_jax import checkpoint, infer
from llama4_jax.config import presets
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names, partitioning
from llama4_jax.model import initialise
from llama4_jax.train import losses, optim, state, step

pytestmark = pytest.mark.multidevice

# Every axis is in one of the first three; `make test-all` has each alone and more mixes.
MESHES = [{"expert": 4, "tensor": 2}, {"slice": 2, "context": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2}]
MORE = [{axis: 2} for axis in partitioning.MESH_AXES] + [
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "expert": 4},
    {"expert": 2, "context": 4},
    {"fsdp": 2, "expert": 2, "context": 2},
]
# With AdamW's usual epsilon a first step is the sign of the gradient, even of one that is nothing but rounding.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, epsilon=1e-2)
TRAIN = TrainConfig(steps=10, optimizer=OPTIMIZER, balance_loss=0.01)
AGAIN = dataclasses.replace(TRAIN, remat="shared", kept_in="host")  # layers computed again, the vision tower's too
SETTINGS = {"data": AGAIN}  # by a mesh's first axis
TOLERANCE = 1e-5  # of values of about 1: fp32 sums of at most a few thousand terms in another order


@pytest.fixture(scope="module")
def config():
    """A chunked dense layer, then a global layer with experts; pictures; several chunks of 16 tokens."""
    config = presets.tiny()
    attention = dataclasses.replace(config.text.attention, nope_interval=2, num_kv_heads=2)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=2, attention=attention))


@pytest.fixture(scope="module")
def batch(config):
    """Eight rows of 48 tokens: two documents, padding, and a picture at the start of each row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100, (8, 49)).astype(np.int32)
    tokens[:, 1 : 1 + config.vision.tokens_per_tile] = config.patch_token
    segments = np.repeat([[1] * 29 + [2] * 17 + [0] * 2], 8, axis=0).astype(np.int32)
    positions = np.concatenate([np.arange(29), np.arange(19)])[None].repeat(8, axis=0).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (segments > 0).astype(np.float32),
        "positions": positions,
        "segments": segments,
        "images": rng.uniform(-1, 1, (8, config.vision.image_size, config.vision.image_size, 3)).astype(np.float32),
    }


def train(model, batch, settings=TRAIN):
    """Parameters, first moments (gradients times a constant) and metrics after one step, as numpy arrays."""
    structure, params = names.split(model)
    optimizer = optim.make(settings.optimizer, settings.steps)
    advance = step.make(
        structure, functools.partial(losses.next_token, config=settings), optimizer, settings, model.config.text
    )
    after, metrics = advance(state.create(params, optimizer), batch)
    moments = optax.tree_utils.tree_get(after.opt_state, "mu")
    return jax.tree.map(np.asarray, (after.params, moments, metrics))


@pytest.fixture(scope="module")
def alone(config, batch):
    """What one device makes of it: parameters and metrics after a step, gradients in the optimiser's moments."""
    return train(initialise(config, seed=3), batch)


def make_mesh(sizes):
    return partitioning.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize("sizes", MESHES + [pytest.param(sizes, marks=pytest.mark.thorough) for sizes in MORE], ids=str)
def test_loss_gradients_and_a_step_do_not_depend_on_the_mesh(config, batch, alone, sizes):
    mesh = make_mesh(sizes)
    placed = {name: place(array, mesh) for name, array in batch.items()}
    model = initialise(config, seed=3)  # drawn in shards in a test of its own: compiling that takes long
    model = jax.device_put(model, partitioning.shardings(model, partitioning.TRAIN, mesh))
    with jax.set_mesh(mesh):
        params, gradients, metrics = train(model, placed, SETTINGS.get(next(iter(sizes)), TRAIN))
    wanted_params, wanted_gradients, wanted_metrics = alone
    assert metrics["router_dropped"] == 0
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted_metrics[name], rtol=1e-4, atol=TOLERANCE, err_msg=name)
    for name, gradient in gradients.items():
        scale = np.abs(wanted_gradients[name]).max() + 1e-6
        np.testing.assert_allclose(gradient / scale, wanted_gradients[name] / scale, atol=TOLERANCE, err_msg=name)
    for name, param in params.items():
        np.testing.assert_allclose(param, wanted_params[name], atol=TOLERANCE, err_msg=name)


def test_drawn_weights_do_not_depend_on_the_mesh(config):
    """To rounding: a program compiled as a whole may multiply and add in one step."""
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    wanted = names.split(initialise(config, seed=3))[1]
    for name, weight in names.split(initialise(config, seed=3, mesh=mesh))[1].items():
        np.testing.assert_allclose(weight, wanted[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("sizes", [{"expert": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}], ids=str)
@pytest.mark.parametrize(
    "placement",
    [pytest.param(partitioning.TRAIN, marks=pytest.mark.thorough), partitioning.SERVE],
    ids=lambda placement: placement.name,
)
def test_decoding_does_not_depend_on_the_mesh(config, sizes, placement):
    prompts, mesh = [[1, 2, 3], [*range(4, 30)]], make_mesh(sizes)
    said = infer.generate(initialise(config, seed=3), prompts, max_new_tokens=24)
    with jax.set_mesh(mesh):
        model = initialise(config, seed=3, mesh=mesh, placement=placement)
        assert infer.generate(model, prompts, max_new_tokens=24) == said


def place(array, mesh):
    sharding = partitioning.batch_sharding(array.shape[:2], partitioning.TRAIN, mesh)
    return jax.device_put(array, sharding) if array.ndim == 2 else array


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"expert": 4, "context": 2}], ids=str)
def test_a_checkpoint_loads_into_its_shards(config, tmp_path, sizes):
    width = config.vision.embed_dim * config.vision.shuffle**2  # the format has one field for this and the adapter's
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, mlp_dim=width))
    model = initialise(config, seed=1)
    checkpoint.save_hf(model, tmp_path / "hf")
    mesh = partitioning.make_mesh(sizes)
    loaded = checkpoint.load_hf(tmp_path / "hf", mesh=mesh)
    wanted = names.split(partitioning.shardings(model, partitioning.TRAIN, mesh))[1]
    for name, weight in names.split(loaded)[1].items():
        np.testing.assert_array_equal(weight, names.split(model)[1][name])
        assert weight.sharding == wanted[name], name
        assert weight.addressable_shards[0].data.shape == wanted[name].shard_shape(weight.shape)


def test_keys_travel_round_the_devices_that_share_a_row_and_are_never_gathered(config):
    """One attention layer of each kind, in the model as it is compiled."""
    mesh = partitioning.make_mesh({"context": 4, "data": 2})
    text = dataclasses.replace(config.text, moe=dataclasses.replace(config.text.moe, step=0))
    model = initialise(dataclasses.replace(config, text=text), mesh=mesh)
    tokens = jax.device_put(
        np.ones((2, 256), np.int32), partitioning.batch_sharding((2, 256), partitioning.TRAIN, mesh)
    )
    with jax.set_mesh(mesh):
        program = jax.jit(lambda model, tokens: model.hidden(tokens).hidden).lower(model, tokens).compile().as_text()
    assert "collective-permute" in program
    gathered = re.findall(r"= (\S+?)\{\S+ all-gather\(", program)
    # Of what belongs to tokens only whole numbers are: they count the positions. The rest are weights, split over embed.
    assert gathered and not [shape for shape in gathered if shape[0] != "s" and re.search("256|128", shape)], gathered
