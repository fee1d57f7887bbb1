"""Roles, decay, schedule, and Muon on stacked and fused matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import presets
from llama4_jax.config.train import OptimizerConfig, TrainConfig
from llama4_jax.core import names
from llama4_jax.model import Llama4
from llama4_jax.train import optim


def all_names() -> dict[str, jax.ShapeDtypeStruct]:
    config = presets.tiny()
    moe = dataclasses.replace(config.text.moe, selection_bias=True)
    attention = dataclasses.replace(config.text.attention, bias=True)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, moe=moe, attention=attention))
    return names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))[1]


def test_every_parameter_has_a_role():
    roles = {name: optim.role(name) for name in all_names()}
    matrices = {name.rsplit(".", 2)[-2] for name, role in roles.items() if role is optim.Role.MATRIX}
    assert matrices >= {"query", "key", "value", "output", "gate_up", "down", "experts", "fc1", "fc2", "projector"}
    assert roles["embed.table"] is optim.Role.EMBEDDING
    assert roles["head.kernel"] is roles["vision.patch.kernel"] is optim.Role.EDGE
    assert roles["decoder.period.1.feed_forward.router.kernel"] is optim.Role.EDGE
    assert roles["decoder.period.1.feed_forward.router.selection_bias"] is optim.Role.FROZEN
    assert roles["decoder.period.0.attention_norm.scale"] is optim.Role.VECTOR
    with pytest.raises(ValueError, match=r"no optimiser rule for parameter 'decoder.strange'"):
        optim.role("decoder.strange")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer):
    params = {
        "decoder.period.0.attention.query.kernel": jnp.ones((2, 4, 2, 2)),
        "decoder.period.0.attention.query.bias": jnp.ones((2, 2, 2)),
        "decoder.period.0.attention_norm.scale": jnp.ones((2, 4)),  # two-dimensional, and no matrix
        "embed.table": jnp.ones((5, 4)),
        "head.kernel": jnp.ones((4, 5)),
        "decoder.period.0.feed_forward.router.selection_bias": jnp.ones((2, 3)),
    }
    config = OptimizerConfig(name=optimizer, learning_rate=0.5, warmup_steps=0, weight_decay=0.25)
    transformation = optim.make(config, steps=10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda g, p: transformation.update(g, transformation.init(p), p))(zero, params)
    moved = {name for name, update in updates.items() if jnp.any(update != 0)}
    assert moved == {"decoder.period.0.attention.query.kernel", "head.kernel"}
    np.testing.assert_allclose(updates["head.kernel"], -0.5 * 0.25)


def test_a_frozen_parameter_ignores_its_gradient():
    params = {"a.selection_bias": jnp.ones(3), "a.kernel": jnp.ones((3, 3))}
    transformation = optim.make(OptimizerConfig(), steps=10)
    updates, state = transformation.update(jax.tree.map(jnp.ones_like, params), transformation.init(params), params)
    assert not jnp.any(updates["a.selection_bias"])
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)]  # no moments either


def test_learning_rate_warms_up_and_falls_by_half_a_cosine():
    rate = optim.schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), steps=110)
    shown = [round(float(rate(step)), 4) for step in (0, 4, 9, 10, 60, 110, 200)]
    assert shown == [0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1]


def test_clipping_bounds_the_gradient_before_the_moments():
    params = {"a.kernel": jnp.zeros((2, 2))}
    transformation = optim.make(OptimizerConfig(clip_norm=1.0), steps=10)
    _, state = transformation.update({"a.kernel": jnp.full((2, 2), 50.0)}, transformation.init(params), params)
    first_moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2)][0]
    np.testing.assert_allclose(first_moments, 0.1 * 0.5, rtol=1e-6)  # (1 - beta1) * 50 / (norm of 100)


def test_muon_turns_each_matrix_of_a_stack_by_itself():
    shapes = {
        "decoder.period.0.attention.query.kernel": (2, 8, 2, 3),  # layers, [8, 2 * 3]
        "decoder.period.0.attention.output.kernel": (2, 2, 3, 8),
        "decoder.period.0.feed_forward.experts.gate_up": (2, 3, 8, 2, 5),  # layers, experts, gate and up apart
    }
    as_matrices = {
        "decoder.period.0.attention.query.kernel": lambda x: x.reshape(2, 8, 6),
        "decoder.period.0.attention.output.kernel": lambda x: x.reshape(2, 6, 8),
        "decoder.period.0.feed_forward.experts.gate_up": lambda x: x.swapaxes(-2, -3).reshape(12, 8, 5),
    }
    keys = jax.random.split(jax.random.key(0), 3)
    gradients = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    transformation = optim.make(config, steps=10)
    params = jax.tree.map(jnp.zeros_like, gradients)
    updates, _ = jax.jit(transformation.update)(gradients, transformation.init(params), params)
    for name, view in as_matrices.items():
        update = np.asarray(view(updates[name]))
        # Five Newton-Schulz steps bring singular values into about [0.7, 1.2], times the scale for RMS 0.2.
        singular = np.linalg.svd(update, compute_uv=False) / (config.muon_rms * max(update.shape[-2:]) ** 0.5)
        assert singular.min() > 0.5 and singular.max() < 1.3
        rms = np.sqrt(np.mean(update**2))
        assert 0.12 < rms < 0.25


def test_configuration_errors_name_field_value_and_choices():
    with pytest.raises(ValueError, match=r"OptimizerConfig.name='sgd'; use one of 'adamw', 'muon'"):
        OptimizerConfig(name="sgd")
    with pytest.raises(ValueError, match=r"TrainConfig.steps=0 must be positive"):
        TrainConfig(steps=0)
    with pytest.raises(ValueError, match=r"TrainConfig.on_nan='ignore'; use one of 'stop', 'rollback'"):
        TrainConfig(steps=1, on_nan="ignore")
