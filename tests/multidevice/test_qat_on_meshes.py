"""A step of quantisation-aware training on a mesh: weights are rounded as on one device, ranges lie with their weights."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from llama4_jax.config import presets
from llama4_jax.config.train import OptimizerConfig, QatConfig, TrainConfig
from llama4_jax.core import names, partitioning
from llama4_jax.model import initialise
from llama4_jax.quant import fake
from llama4_jax.testing import budget
from llama4_jax.train import losses, optim, qat, step
from llama4_jax.train.state import create

pytestmark = pytest.mark.multidevice

MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}]
MORE = [{"fsdp": 8}, {"expert": 4, "tensor": 2}, {"data": 2, "tensor": 4}, {"slice": 2, "context": 2, "fsdp": 2}]
ROWS = QatConfig(recipe="w4a8", group=8, cache="int8")
LEARNED = QatConfig(recipe="int4_all", group=8, ranges="learned")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, epsilon=1e-2)


# Of how a gradient errs by rounding rows. Where a number flips (`testing.flips`) all of its token that follows is rounded anew, to
# noise that differs by sqrt(2) from what it was; a token in 600 did so when it was counted, and 3 in 100 may.
FLIPPED = (2 * 0.03) ** 0.5


class Unrounded(QatConfig):
    """The same weights, but no row is rounded, nor keys and values."""

    @property
    def preset(self):
        rules = tuple((name, dataclasses.replace(spec, activations=None)) for name, spec in super().preset.rules)
        return dataclasses.replace(super().preset, rules=rules)


@pytest.fixture(scope="module")
def config():
    """A dense layer, then one with experts; text alone."""
    config = presets.tiny()
    attention = dataclasses.replace(config.text.attention, nope_interval=2, num_kv_heads=4)
    text = dataclasses.replace(config.text, num_layers=2, attention=attention, mlp_dim=64, embed_dim=64)
    moe = dataclasses.replace(text.moe, expert_dim=32)
    return dataclasses.replace(config, text=dataclasses.replace(text, moe=moe), vision=None, patch_token=None)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100, (8, 25)).astype(np.int32)
    ones = np.ones((8, 24), np.int32)
    positions = np.arange(24, dtype=np.int32)[None].repeat(8, axis=0)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segments": ones}
    return rows | {"loss_weights": ones.astype(np.float32)}


def train(model, batch, rounding):
    """Parameters and first moments (gradients times a constant) after one step, and the loss."""
    settings = TrainConfig(steps=10, optimizer=OPTIMIZER, qat=rounding)
    structure, params = names.split(model)
    optimizer = optim.make(settings.optimizer, settings.steps)
    objective = functools.partial(losses.next_token, config=settings)
    take = step.make(structure, objective, optimizer, settings, model.config.text)
    after, metrics = take(create(qat.prepared(params, rounding), optimizer), batch)
    return after.params, optax.tree_utils.tree_get(after.opt_state, "mu"), metrics["loss"]


@pytest.fixture(scope="module")
def alone(config, batch):
    return functools.cache(
        lambda rounding: jax.tree.map(np.asarray, train(initialise(config, seed=3), batch, rounding))
    )


def on(sizes, config, batch, rounding):
    mesh = partitioning.make_mesh(sizes)
    rows = {
        name: jax.device_put(array, partitioning.batch_sharding(array.shape, partitioning.TRAIN, mesh))
        for name, array in batch.items()
    }
    model = initialise(config, seed=3)
    model = jax.device_put(model, partitioning.shardings(model, partitioning.TRAIN, mesh))
    with jax.set_mesh(mesh):
        return train(model, rows, rounding)


@pytest.mark.parametrize("sizes", MESHES + [pytest.param(sizes, marks=pytest.mark.thorough) for sizes in MORE], ids=str)
def test_a_step_with_rounding_does_not_depend_on_the_mesh(config, batch, alone, sizes):
    params, moments, loss = on(sizes, config, batch, LEARNED)
    wanted_params, wanted_moments, wanted_loss = alone(LEARNED)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for name, moment in moments.items():
        scale = np.abs(wanted_moments[name]).max() + 1e-6
        learned = name.endswith(fake.RANGE)  # whose gradients are rounded to the bfloat16 of scales
        relative, moved = (2**-7, OPTIMIZER.learning_rate * 2**-7) if learned else (0, 1e-5)
        np.testing.assert_allclose(moment / scale, wanted_moments[name] / scale, relative, 1e-5, err_msg=name)
        np.testing.assert_allclose(params[name], wanted_params[name], 0, moved, err_msg=name)
        if learned:
            weight = params[name.removesuffix(fake.RANGE)]
            spec = zip(params[name].sharding.spec, weight.sharding.spec)
            assert all(part in (None, whole) for part, whole in spec) and moment.sharding == params[name].sharding
            assert not params[name].sharding.is_fully_replicated or weight.sharding.is_fully_replicated, name


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", MESHES + MORE, ids=str)
def test_rows_are_rounded_on_a_mesh_as_on_one_device(config, batch, alone, sizes):
    _, moments, loss = on(sizes, config, batch, ROWS)
    _, wanted, wanted_loss = alone(ROWS)
    _, unrounded, unrounded_loss = alone(Unrounded(recipe="w4a8", group=8))
    noise = abs(wanted_loss - unrounded_loss)
    assert 1e-5 < noise and abs(loss - wanted_loss) < budget.CONFIDENCE * FLIPPED * noise + 1e-6 * wanted_loss
    size = lambda array: np.sqrt(np.mean(np.square(array)))  # noqa: E731
    for name, moment in moments.items():
        allowed = FLIPPED * size(wanted[name] - unrounded[name]) + 1e-6 * size(wanted[name])
        assert size(moment - wanted[name]) < allowed, name
