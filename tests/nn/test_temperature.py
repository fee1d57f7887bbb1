"""Temperature tuning of global layers: its published values, exact steps, and what it multiplies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import Attention, FeedForward, LayerKind, presets
from llama4_jax.nn.attention import Context, DecoderAttention, temperature

SCOUT = presets.scout().text.attention
EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, 1.0), (8190, 1.0), (8191, 1.0693), (16_382, 1.0693), (16_383, 1.1099), (131_071, 1.2833), (262_143, 1.3497)],
)
def test_published_values(position, value):
    assert float(temperature(jnp.array(position), SCOUT)) == pytest.approx(value, abs=5e-5)  # four digits are given


@pytest.mark.parametrize("step", [1, 1023, 1024, 1279])  # 1024 steps are 2^23, 1280 the ten million of Scout
def test_every_step_comes_at_its_own_position(step):
    border = step * 8192 - 1
    found = np.asarray(temperature(jnp.arange(border - 2, border + 3), SCOUT), np.float64)
    wanted = [1 + 0.1 * np.log1p(step - 1)] * 2 + [1 + 0.1 * np.log1p(step)] * 3
    np.testing.assert_allclose(found, wanted, rtol=4 * EPS)
    assert found[1] < found[2]


def test_padding_is_left_alone():
    assert float(temperature(jnp.array(-1), SCOUT)) == 1.0


def attend(tuned: bool, config, start: int) -> np.ndarray:
    kind = LayerKind(
        attention=Attention.GLOBAL, rope=False, qk_norm=False, temperature=tuned, feed_forward=FeedForward.DENSE
    )
    layer = DecoderAttention(config, kind, 16, norm_eps=1e-5, rngs=nnx.Rngs(0))
    layer.query.kernel[...] = 4 * layer.query.kernel[...]  # peaky
    positions = start + jnp.arange(4)[None]
    context = Context(positions, jnp.ones_like(positions), jnp.zeros((1, 4, config.head_dim // 2)))
    return np.asarray(layer(jax.random.normal(jax.random.key(1), (1, 4, 16)), context)[0])


def test_the_temperature_sharpens_queries_from_the_first_step_on():
    """Before it, and with a step of size zero, the layer is the untuned one to the bit."""
    config = dataclasses.replace(presets.tiny().text.attention, floor_scale=8, attn_scale=1.0)
    plain = attend(False, config, start=0)
    np.testing.assert_array_equal(attend(True, config, start=0), plain)
    np.testing.assert_array_equal(attend(True, dataclasses.replace(config, attn_scale=0.0), start=16), plain)
    moved = np.abs(attend(True, config, start=16) - plain).max(axis=(0, 2))
    assert moved[0] == 0  # the first token sees one key: nothing to sharpen
    assert moved[1:].min() > 1e-3
